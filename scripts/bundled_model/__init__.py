"""How the bundled model was made: its configuration, training batches, scores and model card."""
