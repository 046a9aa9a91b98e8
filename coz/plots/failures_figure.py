"""Appendix J: answers of the prompt extractor before and after its tuning, out of a GRPO run's pages of completions."""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image, ImageDraw

from coz.errors import UserError
from coz.plots.drawing import BACKGROUND, FAINT, GAP_PX, INK, LINE_PX, TEXT_PX, color_of, wrap, write_lines

FIGURE_PX = 960
_PICTURE_PX = 160
_TEXT_LEFT = 4 * GAP_PX + 2 * _PICTURE_PX
_TITLE_PX = LINE_PX + 12
_ANSWER_LINES = 5
_SLIGHT = 0.005  # a gain below this is none beside another
_TITLES = {"repetition": "Repetition", "phrase": "Unwanted phrases", "critic": "Suboptimal results"}
_STEP = re.compile(r"step_(\d+)\.html$")


@dataclass(frozen=True)
class Completion:
    """An answer to a held-out pair."""

    pictures: tuple[str, str]  # context and view, as the page holds them
    text: str
    rewards: Mapping[str, float]  # the weighted sum as `total`


@dataclass(frozen=True)
class Example:
    """A pair whose answer a reward changed."""

    reward: str
    before: Completion
    after: Completion


def completion_steps(run: Path) -> list[int]:
    """The steps whose completions a run kept.

    Raises:
        UserError: there are none.
    """
    steps = sorted(int(found[1]) for file in (run / "completions").glob("step_*.html") if (found := _STEP.search(file.name)))
    if not steps:
        raise UserError(f"{run} holds no completions; give the folder of a run of train_grpo.py that has validated once")
    return steps


def read_completions(run: Path, step: int) -> list[Completion]:
    """The answers of one validation.

    Raises:
        UserError: no such step, or a page that is none.
    """
    file = run / "completions" / f"step_{step:06d}.html"
    if not file.is_file():
        raise UserError(
            f"{run} kept no completions of step {step}; it has those of {', '.join(map(str, completion_steps(run)))}"
        )
    page = _Page()
    page.feed(file.read_text(encoding="utf-8"))
    try:
        return [page.completion(row) for row in page.rows]
    except (ValueError, IndexError) as error:
        raise UserError(
            f"{file} is no page of completions ({error}); run train_grpo.py again, or choose another step"
        ) from error


class _Page(HTMLParser):
    """The table that `training.grpo_watch.page` writes: two pictures, the answer, a cell per reward."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[str] = []
        self.rows: list[tuple[list[str], list[str]]] = []  # pictures, cells' texts
        self._within = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag if tag in ("th", "td", "i") else ""
        if tag == "tr":
            self.rows.append(([], []))
        elif tag == "th":
            self.heads.append("")
        elif tag == "td" and self.rows:
            self.rows[-1][1].append("")
        elif tag == "img" and self.rows:
            self.rows[-1][0].append(dict(attrs).get("src") or "")

    def handle_endtag(self, tag: str) -> None:
        self._within = ""
        if tag == "table":
            self.rows = [row for row in self.rows if row[1]]  # without the heads'

    def handle_data(self, data: str) -> None:
        if self._within == "th":
            self.heads[-1] += data
        elif self._within == "td" and self.rows and self.rows[-1][1]:
            self.rows[-1][1][-1] += data  # not what stands in <i>: the page's remark on an empty answer

    def completion(self, row: tuple[list[str], list[str]]) -> Completion:
        pictures, texts = row
        if len(pictures) != 2 or len(texts) != len(self.heads):
            raise ValueError(f"a row of {len(texts)} cells under {len(self.heads)} heads")
        values = dict(zip(self.heads[3:], map(float, texts[3:]), strict=True))
        return Completion((pictures[0], pictures[1]), texts[2].strip(), values)


def choose_examples(before: Sequence[Completion], after: Sequence[Completion]) -> list[Example]:
    """For each reward the pair whose answer gained most by it, rather one that gained by no other; no pair twice.

    Pairs are told apart by their pictures.

    Raises:
        UserError: no pair is in both.
    """
    later = {completion.pictures: completion for completion in after}
    pairs = [(completion, later[completion.pictures]) for completion in before if completion.pictures in later]
    if not pairs:
        raise UserError("the two steps answered no pair in common; choose others with --before and --after")
    names = [name for name in pairs[0][0].rewards if name != "total"]
    examples, used = [], set()
    for name in sorted(names, key=lambda name: list(_TITLES).index(name) if name in _TITLES else len(_TITLES)):
        gains = {
            index: gain
            for index, (first, last) in enumerate(pairs)
            if index not in used and not math.isnan(gain := last.rewards[name] - first.rewards[name])
        }
        alone = {index: _gains(*pairs[index], names) == [name] for index in gains}
        best = max(gains, key=lambda index: (alone[index], gains[index], -index), default=None)
        if best is not None and gains[best] > 0:
            used.add(best)
            examples.append(Example(name, *pairs[best]))
    return examples


def _gains(before: Completion, after: Completion, names: Sequence[str]) -> list[str]:
    return [name for name in names if after.rewards[name] > before.rewards[name] + _SLIGHT]


def draw_failures(examples: Sequence[Example], *, steps: tuple[int, int]) -> Image.Image:
    """A block per example: its two pictures, and both answers with every reward.

    Args:
        steps: of the answers before and after.
    """
    answers = [[_answer_lines(completion.text) for completion in (e.before, e.after)] for e in examples]
    blocks_px = [
        _TITLE_PX + max(sum(_half_px(lines) for lines in halves), _PICTURE_PX + LINE_PX) + 2 * GAP_PX for halves in answers
    ]
    canvas = Image.new("RGB", (FIGURE_PX, GAP_PX + sum(blocks_px)), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    top = GAP_PX
    for number, (example, halves, block_px) in enumerate(zip(examples, answers, blocks_px, strict=True), start=1):
        title = f"{number}  {_TITLES.get(example.reward, example.reward)}"
        write_lines(draw, (GAP_PX, top), [title], size_px=TEXT_PX + 3)
        for place, (name, data) in enumerate(zip(("context", "view"), example.before.pictures, strict=True)):
            at = (GAP_PX + place * (_PICTURE_PX + GAP_PX), top + _TITLE_PX)
            canvas.paste(_picture(data).resize((_PICTURE_PX, _PICTURE_PX), Image.Resampling.LANCZOS), at)
            write_lines(draw, (at[0], at[1] + _PICTURE_PX + 3), [name], color=FAINT)
        place_px = top + _TITLE_PX
        for ink, when, completion, lines in (
            (color_of(1), f"before tuning (step {steps[0]})", example.before, halves[0]),
            (color_of(3), f"after tuning (step {steps[1]})", example.after, halves[1]),
        ):
            draw.line((_TEXT_LEFT - GAP_PX, place_px, _TEXT_LEFT - GAP_PX, place_px + _half_px(lines) - 14), fill=ink, width=3)
            write_lines(draw, (_TEXT_LEFT, place_px), [when], color=ink)
            write_lines(draw, (_TEXT_LEFT, place_px + LINE_PX), lines, color=INK if completion.text else FAINT)
            told = "     ".join(f"{name} {value:.3f}" for name, value in completion.rewards.items()).replace("-", "−")
            write_lines(draw, (_TEXT_LEFT, place_px + LINE_PX * (1 + len(lines)) + 2), [told], color=FAINT)
            place_px += _half_px(lines)
        top += block_px
    return canvas


def _answer_lines(text: str) -> list[str]:
    return wrap(text, FIGURE_PX - _TEXT_LEFT - GAP_PX, lines=_ANSWER_LINES) or ["(empty)"]


def _half_px(lines: Sequence[str]) -> int:
    return LINE_PX * (2 + len(lines)) + 20


def _picture(data_url: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2], validate=True))) as image:
            return image.convert("RGB")
    except (OSError, binascii.Error) as error:
        raise UserError(f"a picture in the page of completions cannot be read ({error}); run train_grpo.py again") from error
