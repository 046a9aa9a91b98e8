"""Training: losses, the super-resolution loop, its checkpoints."""
