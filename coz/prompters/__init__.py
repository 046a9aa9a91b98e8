"""Prompt extractors: what a step's backbone is told about its view (see `base`)."""
