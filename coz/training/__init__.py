"""Training: the super-resolution loop and the tuning of the prompt extractor."""
