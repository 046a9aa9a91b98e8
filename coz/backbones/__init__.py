"""Super-resolution backbones: one file per family, one call contract (see `base`)."""
