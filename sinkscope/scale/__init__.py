"""Run an experiment's parts here or on many workers."""
