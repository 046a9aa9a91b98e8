"""Training: the super-resolution backbone, and the prompt extractor by GRPO."""
