"""coz: extreme super-resolution of photographs by Chain-of-Zoom (arXiv 2505.18600)."""

__version__ = "0.1.0"
__all__ = ["Zoom", "enlarge", "zoom"]

_HOMES = {"zoom": "coz.zooming", "Zoom": "coz.zooming", "enlarge": "coz.enlarging"}


def __getattr__(name: str) -> object:
    """`coz.zoom` and its like, imported when first used, so that `import coz` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'coz' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
