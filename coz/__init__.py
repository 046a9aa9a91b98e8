"""coz: extreme super-resolution of photographs by Chain-of-Zoom (arXiv 2505.18600)."""

__version__ = "0.1.0"
