"""What a picture says of itself: that its detail is computed, and by what.

The note names models and settings, never a place on a disk or a time, so that equal states stay equal to the byte.
Read it with `exiftool`, `identify -verbose`, or `PIL.Image.open(file).text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coz import __version__

SOFTWARE = f"coz {__version__} (Chain-of-Zoom, arXiv 2505.18600)"
INVENTED = (
    "Detail beyond the photograph's own pixels was computed by a model, not recorded by a camera. It is plausible, not "
    "evidence: do not use it to identify people or to establish facts."
)


def note_on(
    *, backbone: Mapping[str, object], prompter: Mapping[str, object], scale: float, fingerprint: str, prompt: str = ""
) -> dict[str, str]:
    """The note on a state, a strip or an enlargement, as texts by PNG keyword.

    Args:
        backbone, prompter: fingerprints of what made it.
        scale: magnification since the start; at 1 nothing was invented, and only the software is named.
        fingerprint: of everything that shaped it.
        prompt: the words of the last step.
    """
    if scale <= 1:
        return {"Software": SOFTWARE, "Fingerprint": fingerprint}
    note = {"Software": SOFTWARE, "Warning": INVENTED, "Backbone": _model(backbone), "Prompter": _model(prompter)}
    note |= {"Scale": f"{scale:g}x", "Fingerprint": fingerprint}
    return note | ({"Prompt": prompt} if prompt else {})


def note_on_several(
    *, backbones: Sequence[str], prompters: Sequence[str], scales: Sequence[float], fingerprint: str
) -> dict[str, str]:
    """The note on a picture that shows several states, such as a strip."""
    note = {"Software": SOFTWARE, "Warning": INVENTED, "Backbone": ", ".join(backbones), "Prompter": ", ".join(prompters)}
    return note | {"Scale": ", ".join(f"{scale:g}x" for scale in scales), "Fingerprint": fingerprint}


def _model(fingerprint: Mapping[str, object]) -> str:
    """`name (weights …)`; digests are cut short, and what looks like a place on a disk is left out."""
    name, weights = str(fingerprint.get("name", "unknown")), fingerprint.get("weights")
    values = weights if isinstance(weights, list | tuple) else [weights]
    told = [value if len(value) < 64 else value[:12] for value in values if isinstance(value, str) and "/" not in value[:1]]
    return f"{name} (weights {', '.join(told)})" if told else name
