"""What a model is, read from its modules and their source: paths and numbers, no modules."""
