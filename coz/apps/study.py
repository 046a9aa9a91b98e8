"""The preference study of the paper's appendix D: collect grades on a web page, then analyse them.

python -m coz.apps.study serve RUN… --conditions single=coz_vlm_single multi=coz_vlm "tuned=coz_vlm[prompter.adapter=…]"
python -m coz.apps.study analyse
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from coz.apps.study_material import read_material
from coz.apps.study_store import StudyStore
from coz.errors import UserError, exit_code
from coz.store import write_atomic
from coz.study_analysis import Rating, Unit, tables
from coz.study_figure import draw_bars

_DATABASE = Path("outputs/study/ratings.sqlite")


def serve(given: argparse.Namespace) -> None:
    """The web page, until it is stopped.

    Raises:
        UserError: runs that do not fit, too few photographs.
    """
    conditions = read_conditions(given.conditions)
    material = read_material(given.runs, conditions, text_step=given.text_step, states=given.states)
    sets = {"image": given.image_sets, "text": given.text_sets}
    for part, photos in (("image", material.photos), ("text", material.texts)):
        if not 0 <= sets[part] <= len(photos):
            what = "photographs" if part == "image" else "photographs with a text under every condition"
            raise UserError(f"--{part}-sets {sets[part]} needs as many {what}, the runs have {len(photos)}")
    if not sum(sets.values()):
        raise UserError("--image-sets 0 --text-sets 0 leaves nothing to rate")
    store = StudyStore(given.database)
    store.bind(material)
    import uvicorn
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from coz.apps.study_page import build_app

    app = build_app(material, store, sets=sets)
    if given.host in ("127.0.0.1", "localhost", "::1"):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    print(f"the study is at http://{given.host}:{given.port}, answers go to {given.database}; Ctrl-C stops it", flush=True)
    # No access log: addresses of people are nobody's business.
    uvicorn.run(app, host=given.host, port=given.port, log_level="warning", access_log=False)


def read_conditions(words: Sequence[str]) -> dict[str, str]:
    """NAME=METHOD words as a mapping, in order.

    Raises:
        UserError: a word without =, a name twice.
    """
    conditions: dict[str, str] = {}
    for word in words:
        name, equals, method = word.partition("=")
        if not equals or not name or not method or name in conditions:
            raise UserError(f"--conditions {word!r} must be NAME=METHOD, each name once, as in multi=coz_vlm")
        conditions[name] = method
    return conditions


def analyse(given: argparse.Namespace) -> None:
    """Tables on the screen; tables, figure and the answers without tokens into the folder.

    Raises:
        UserError: no such file, no answers yet.
    """
    if not given.database.is_file():
        raise UserError(f"{given.database} does not exist; collect answers first: python -m coz.apps.study serve …")
    store = StudyStore(given.database)
    ratings, conditions = store.ratings(), store.conditions
    if not ratings:
        raise UserError(f"{given.database} holds no answers yet")
    out = given.out or given.database.parent
    unit: Unit = given.unit
    scores, comparisons = tables(ratings, conditions, unit=unit)
    text = f"{scores.markdown()}\n{comparisons.markdown()}"
    write_atomic(out / "study.md", text)
    write_atomic(out / "ratings.csv", _csv(ratings))
    print(text)
    print(f"figure: {draw_bars(ratings, conditions, out=out / 'study.png', unit=unit)}")


def _csv(ratings: Sequence[Rating]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["person", "part", "photo", "condition", "score"])
    writer.writerows([(r.person, r.part, r.photo, r.condition, r.score) for r in ratings])
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 and one sentence where the user can mend it."""
    parser = argparse.ArgumentParser(prog="python -m coz.apps.study", description="The preference study of appendix D.")
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("serve", help="the web page that collects grades")
    page.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of evaluate.py that hold the conditions")
    page.add_argument("--conditions", nargs="+", required=True, metavar="NAME=METHOD", help="methods as the tables write them")
    page.add_argument("--states", type=Path, help="the state store; default: the folder `states` above the runs")
    page.add_argument("--image-sets", type=int, default=5, help="zooms that each person rates (%(default)s, the paper's)")
    page.add_argument("--text-sets", type=int, default=5, help="texts that each person rates (%(default)s, the paper's)")
    page.add_argument("--text-step", type=int, default=1, help="the step whose texts are rated (%(default)s)")
    page.add_argument("--host", default="127.0.0.1", help="%(default)s; 0.0.0.0 lets others in")
    page.add_argument("--port", type=int, default=7861, help="%(default)s")
    page.set_defaults(task=serve)
    result = commands.add_parser("analyse", help="means, paired t-tests, the figure")
    result.add_argument("--out", type=Path, help="default: the database's folder")
    result.add_argument("--unit", choices=["person", "set"], default="person", help="what makes a pair (%(default)s)")
    result.set_defaults(task=analyse)
    for command in (page, result):
        command.add_argument("--database", type=Path, default=_DATABASE, help="%(default)s")
    given = parser.parse_args(arguments)
    return exit_code(lambda: given.task(given))


if __name__ == "__main__":
    sys.exit(main())
