"""Stored pictures inside a page: each once, as a small JPEG in a style rule, within a budget."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from coz.stored_chains import StateFolder


class Pictures:
    """Embeds states' pictures and remembers which it has.

    A picture becomes a rule `.s-KEY{background-image:url(data:…)}`, so that it lies in the page once however often it is shown.
    """

    def __init__(self, states: StateFolder, *, limit: int, side_px: int, quality: int, max_mb: float) -> None:
        self._states, self._limit, self._side_px, self._quality = states, limit, side_px, quality
        self._left = int(max_mb * 1e6)
        self._rules: dict[str, str] = {}
        self.refused = 0
        """Pictures left out by the budget."""

    def __len__(self) -> int:
        return len(self._rules)

    def embed(self, key: str) -> str | None:
        """The style class that shows a state, or None where it is gone or the budget is used up."""
        if key in self._rules:
            return f"s-{key}"
        path = self._states.image(key)
        if path is None:
            return None
        if len(self._rules) >= self._limit or self._left <= 0:
            self.refused += 1
            return None
        rule = f'.s-{key}{{background-image:url("{self._data_url(path)}")}}'
        self._left -= len(rule)
        self._rules[key] = rule
        return f"s-{key}"

    def style(self) -> str:
        """The rules of all pictures."""
        return "\n".join(self._rules.values())

    def _data_url(self, path: Path) -> str:
        with Image.open(path) as file:
            image = file.convert("RGB")
        image.thumbnail((self._side_px, self._side_px), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self._quality, optimize=True)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
