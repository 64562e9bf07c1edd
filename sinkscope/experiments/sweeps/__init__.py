"""The parts of `sinkscope.sweep`: its grid, its scores, one image at a time, its files, its result."""
