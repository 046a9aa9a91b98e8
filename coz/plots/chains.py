"""Chains as figures show them: each state's picture, words, and place in the picture before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from coz.errors import UserError
from coz.report.reading import Results
from coz.stored_chains import ShownChain, read_chain
from coz.tables import method_order

# As the paper's figures write them.
_LABELS = {
    "nn": "NN Interpolation",
    "bicubic": "Bicubic Interpolation",
    "direct": "Direct SR",
    "coz_null": "CoZ (Null)",
    "coz_tags": "CoZ (tags)",
    "coz_dape": "CoZ (DAPE)",
    "coz_vlm_single": "CoZ (VLM, single image)",
    "coz_vlm": "CoZ (VLM)",
}


def choose_photos(results: Results, names: Sequence[str] | None, *, limit: int) -> list[str]:
    """The photographs asked for, or the first few.

    Raises:
        UserError: one that these runs do not hold, or no picture at all.
    """
    if not results.photos:
        raise UserError("these runs made no picture; see the failures in their table.md")
    if results.states.root is None:
        raise UserError("the state store was not found above these runs; name it with --states, such as outputs/states")
    unknown = [name for name in names or () if name not in results.photos]
    if unknown:
        raise UserError(f"no photograph {', '.join(unknown)} in these runs; they hold {', '.join(results.photos)}")
    return list(names or results.photos[:limit])


def choose_methods(results: Results, asked: Sequence[str] | None) -> dict[str, str]:
    """Method → its label, in the order asked for or the paper's. What is asked for is METHOD or LABEL=METHOD.

    Raises:
        UserError: a method that these runs do not hold.
    """
    known = sorted({str(row["method"]) for row in results.done}, key=method_order)
    chosen = {}
    for word in asked or known:
        label, _, method = word.partition("=")
        if word in known:
            method, label = word, _label(word)
        if method not in known:
            raise UserError(f"no method {method or word} in these runs; they hold {', '.join(known)}")
        chosen[method] = label
    return chosen


def _label(method: str) -> str:
    """`coz_vlm[prompter.adapter=x]` → `CoZ (VLM) [prompter.adapter=x]`."""
    base, bracket, rest = method.partition("[")
    return _LABELS.get(base, base) + (f" [{rest}" if bracket else "")


def choose_scales(there: Iterable[float], asked: Sequence[float] | None, *, refusal: str) -> list[float]:
    """The scales asked for, or all.

    Args:
        refusal: the sentence on scales that are not there, with places for `unknown` and `known` ones.

    Raises:
        UserError: one that is not there.
    """
    known = sorted(set(there))
    unknown = [scale for scale in asked or () if scale not in known]
    if unknown:
        listed = {
            name: ", ".join(f"{scale:g}" for scale in scales) for name, scales in (("unknown", unknown), ("known", known))
        }
        raise UserError(refusal.format(**listed))
    return sorted(asked or known)


def deepest_chain(results: Results, photo: str, method: str) -> ShownChain | None:
    """A photograph's chain to the largest scale of a method, or None where there is none."""
    mine = {scale: key for (own, scale), key in results.keys(photo).items() if own == method}
    return read_chain(results.states, mine[max(mine)]) if mine else None
