"""The parts of `linear_probes`: labelled images, mean states, classifiers, and what came out."""
