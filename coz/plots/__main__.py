"""The paper's figures out of finished runs, without any model.

python -m coz.plots strips RUN…         Figures 1, 12 to 16: the input and a method's states, a row per photograph
python -m coz.plots grid RUN…           Figures 3, 5, 11: photographs and scales against methods
python -m coz.plots prompts RUN…        Figure 8: ways of prompting, their states and words, for one photograph
python -m coz.plots rewards GRPO_RUN…   Figures 6, 7: reward curves
python -m coz.plots failures GRPO_RUN   Appendix J: answers before and after tuning

Figure 10 is `python -m coz.apps.study analyse`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from coz.errors import UserError, exit_code
from coz.image import encode_png
from coz.plots.chains import choose_methods, choose_photos, choose_scales, deepest_chain
from coz.plots.failures_figure import choose_examples, completion_steps, draw_failures, read_completions
from coz.plots.grid_figure import draw_grid
from coz.plots.rewards import draw_rewards
from coz.plots.zoom_figures import draw_prompt_rows, draw_zoom_rows
from coz.provenance import note_on, note_on_several
from coz.report.reading import Results, read_results
from coz.store import fingerprint, write_atomic
from coz.stored_chains import ShownChain, read_chain
from coz.tables import method_order


def strips(given: argparse.Namespace) -> Path:
    """Figures 1 and 12 to 16."""
    results = read_results(given.runs, states=given.states)
    methods = choose_methods(results, [given.method] if given.method else None)
    method = max(methods, key=method_order) if given.method is None else next(iter(methods))
    photos = choose_photos(results, given.photos, limit=6)
    chains = {photo: chain for photo in photos if (chain := deepest_chain(results, photo, method)) is not None}
    if not chains:
        raise UserError(
            f"{method} has no stored pictures of {', '.join(photos)}; run evaluate.py again, it makes what is missing"
        )
    scales = _shown_scales(chains.values(), given.scales)
    image = draw_zoom_rows(chains, scales=scales, cell_px=given.cell_px, credits=results.found.credits)
    return _save(given, image, results, "strips", list(chains.values()))


def grid(given: argparse.Namespace) -> Path:
    """Figures 3, 5 and 11."""
    results = read_results(given.runs, states=given.states)
    photos = choose_photos(results, given.photos, limit=4)
    methods = choose_methods(results, given.methods)
    have = [float(row["scale"]) for row in results.done]  # type: ignore[arg-type]
    scales = choose_scales(have, given.scales, refusal="no scale {unknown} in these runs; they hold {known}")
    cells: dict[tuple[str, float, str], ShownChain] = {}
    for photo in photos:
        for (method, scale), key in results.keys(photo).items():
            chain = read_chain(results.states, key)
            if chain is not None and method in methods:
                cells[photo, scale, method] = chain
    image = draw_grid(
        cells, photos=photos, scales=scales, methods=methods, cell_px=given.cell_px, credits=results.found.credits
    )
    shown = [chain for (_, scale, _), chain in cells.items() if scale in scales]
    return _save(given, image, results, "grid", shown)


def prompts(given: argparse.Namespace) -> Path:
    """Figure 8."""
    results = read_results(given.runs, states=given.states)
    (photo,) = choose_photos(results, [given.photo] if given.photo else None, limit=1)
    methods = choose_methods(results, given.methods)
    found = {method: deepest_chain(results, photo, method) for method in methods}
    # Interpolation and direct enlargement ask nobody; unless they were asked for, they have no row.
    chains = {
        methods[method]: chain
        for method, chain in found.items()
        if chain is not None and (given.methods or any(shot.prompt for shot in chain.shots))
    }
    if not chains:
        raise UserError(f"no method of these runs has prompts for {photo}; evaluate coz_vlm_single, coz_vlm or coz_tags")
    scales = _shown_scales(chains.values(), given.scales)
    image = draw_prompt_rows(chains, scales=scales, cell_px=given.cell_px)
    return _save(given, image, results, "prompts", list(chains.values()))


def rewards(given: argparse.Namespace) -> Path:
    """Figures 6 and 7."""
    return draw_rewards(given.runs, out=given.out or given.runs[0] / "rewards.png")


def failures(given: argparse.Namespace) -> Path:
    """Appendix J."""
    steps = completion_steps(given.run)
    before = steps[0] if given.before is None else given.before
    after = steps[-1] if given.after is None else given.after
    if before >= after:
        raise UserError(f"before={before} must be a step before after={after}; this run kept {', '.join(map(str, steps))}")
    examples = choose_examples(read_completions(given.run, before), read_completions(given.run, after))
    if not examples:
        raise UserError(f"no answer gained by any reward between steps {before} and {after}; choose others")
    image = draw_failures(examples, steps=(before, after))
    key = fingerprint({"figure": "failures", "before": before, "after": after, "texts": [e.after.text for e in examples]})
    out = given.out or given.run / "failures.png"
    write_atomic(out, encode_png(image, note=note_on(backbone={}, prompter={}, scale=1, fingerprint=key)))
    return out


def _shown_scales(chains: Iterable[ShownChain], asked: Sequence[float] | None) -> list[float]:
    have = [shot.scale for chain in chains for shot in chain.shots]
    return choose_scales(have, asked, refusal="no state at {unknown}x in these chains; they have {known}")


def _save(given: argparse.Namespace, image: Image.Image, results: Results, name: str, chains: Sequence[ShownChain]) -> Path:
    keys = sorted({shot.key for chain in chains for shot in chain.shots})
    rows = [row for row in results.done if row["state"] in keys]
    note = note_on_several(
        backbones=sorted({str(row["backbone"]) for row in rows}),
        prompters=sorted({str(row["prompter"]) for row in rows}),
        scales=sorted({shot.scale for chain in chains for shot in chain.shots}),
        fingerprint=fingerprint({"figure": name, "states": keys}),
    )
    out: Path = given.out or given.runs[0] / f"{name}.png"
    write_atomic(out, encode_png(image, note=note))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# the command


def _scale(text: str) -> float:
    value = float(text)
    if not value > 1:
        raise ValueError
    return value


def _cell_px(text: str) -> int:
    value = int(text)
    if not 32 <= value <= 1024:
        raise argparse.ArgumentTypeError(f"{text} must lie between 32 and 1024")
    return value


def _out(text: str) -> Path:
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text} must end in .png")
    return Path(text)


_scale.__name__ = "magnification"  # what argparse calls a value that is none


def _parser() -> argparse.ArgumentParser:
    about, _, listed = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m coz.plots", description=about, epilog=listed, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run_help = "folders that evaluate.py wrote, of a job or a sweep"

    def add(draw: Callable[[argparse.Namespace], Path], help_text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(draw.__name__, help=help_text, description=help_text)
        command.set_defaults(draw=draw)
        return command

    for draw, help_text in ((strips, "a row of states per photograph"), (grid, "photographs and scales against methods")):
        command = add(draw, help_text)
        command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=run_help)
        command.add_argument("--photos", nargs="+", metavar="NAME", help="default: the first few")
        command.add_argument("--scales", nargs="+", type=_scale, metavar="SCALE", help="default: all")
        if draw is strips:
            command.add_argument("--method", help="default: the last in the paper's order, such as coz_vlm")
        else:
            command.add_argument("--methods", nargs="+", metavar="[LABEL=]METHOD", help="default: all")
        _drawn(command, f"{draw.__name__}.png in the first run")
    command = add(prompts, "ways of prompting, their states and words, for one photograph")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=run_help)
    command.add_argument("--photo", metavar="NAME", help="default: the first")
    command.add_argument("--methods", nargs="+", metavar="[LABEL=]METHOD", help="default: all that have prompts")
    command.add_argument("--scales", nargs="+", type=_scale, metavar="SCALE", help="default: all")
    _drawn(command, "prompts.png in the first run")
    command = add(rewards, "the reward curves of GRPO runs, several together")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of train_grpo.py's runs")
    command.add_argument("--out", type=Path, help="default: rewards.png in the first run")
    command = add(failures, "answers of the prompt extractor before and after tuning, with each reward")
    command.add_argument("run", type=Path, metavar="RUN", help="the folder of a run of train_grpo.py")
    command.add_argument("--before", type=int, metavar="STEP", help="default: the first validation")
    command.add_argument("--after", type=int, metavar="STEP", help="default: the last validation")
    command.add_argument("--out", type=_out, help="default: failures.png in the run")
    return parser


def _drawn(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument("--states", type=Path, help="the state store; default: the folder `states` above the runs")
    command.add_argument("--cell-px", type=_cell_px, default=256, metavar="PX", help="side of each picture (%(default)s)")
    command.add_argument("--out", type=_out, help=f"a PNG; default: {default}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 and one sentence where the user can mend it."""
    given = _parser().parse_args(arguments)
    return exit_code(lambda: print(given.draw(given)))


if __name__ == "__main__":
    sys.exit(main())
