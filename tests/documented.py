"""The commands that the documentation shows, as a reader would copy them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"needs? (?:a GPU|GPUs|weights|the archive)")
_START = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:python|make|pip|torchrun|conda|vllm|hf|source|exiftool|identify) "
    r"|(?:python|make|pip|torchrun)$"
)
_FENCE = re.compile(r"(?ms)^(\s*)```(\w*)[^\n]*\n(.*?)^\1```\s*$")
_INDENTED = re.compile(r"(?m)(?:^(?: {4,}|\t).*\n?)+")
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


@dataclass(frozen=True)
class Command:
    """A line that a reader types."""

    page: str
    text: str
    marked: bool
    """Whether the page says at this line, or in this section, that a GPU or weights are needed."""

    @property
    def words(self) -> list[str]:
        """As a shell splits them, without assignments of variables and what the reader fills in."""
        words = [re.sub(r"=…$", "=x", word) for word in shlex.split(self.text) if word not in ("…", "...")]
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        return words


def commands_of(page: Path) -> Iterator[Command]:
    """Every command in fenced or indented blocks and in running text."""
    for section in re.split(r"(?m)^(?=#+ )", _hidden(page.read_text(encoding="utf-8"))):
        prose, blocks = section, []
        for pattern in (_FENCE, _INDENTED):
            for match in pattern.finditer(prose):
                blocks.append((match.group(2), match.group(3)) if pattern is _FENCE else ("bash", match.group(0)))
            prose = pattern.sub("\n", prose)
        prose_marks = bool(MARK.search(prose))
        for language, block in blocks:
            if language in ("", "bash", "sh", "console"):
                for line in re.sub(r"\\\n\s*", "", block).splitlines():
                    yield from _parse(page.name, line.replace("\0", "#").strip(), prose_marks)
        for match in _INLINE.finditer(prose):
            yield from _parse(page.name, " ".join(match.group(1).replace("\0", "#").split()), prose_marks)


def python_of(page: Path) -> Iterator[str]:
    """The Python blocks of a page."""
    for match in _FENCE.finditer(page.read_text(encoding="utf-8")):
        if match.group(2) == "python" and "--8<--" not in match.group(3):
            yield match.group(3)


def _hidden(text: str) -> str:
    """A page whose comments inside blocks do not look like headings."""
    return _FENCE.sub(lambda match: match.group(0).replace("#", "\0"), text)


def _parse(page: str, line: str, marked: bool) -> Iterator[Command]:
    body, _, remark = line.partition(" #")
    for text in body.split("&&"):
        if _START.match(text.strip() + " "):
            yield Command(page, text.strip(), marked or bool(MARK.search(remark)))
