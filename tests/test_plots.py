"""The paper's figures by command: sizes that follow from what is shown, boxes in place, notes, one-sentence errors."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from coz.data.photos import list_photos
from coz.image import Region
from coz.measuring import Labels, measure
from coz.metrics import ConsistencyStep
from coz.plots.__main__ import main
from coz.plots.chains import choose_methods, deepest_chain
from coz.plots.drawing import GAP_PX, LINE_PX, TEXT_PX, draw_box, font, wrap
from coz.plots.failures_figure import FIGURE_PX, choose_examples, completion_steps, draw_failures, read_completions
from coz.plots.zoom_figures import PROMPT_LINES
from coz.provenance import INVENTED
from coz.report.reading import read_results
from coz.results import JobRecord, save_job
from coz.stored_chains import read_chain
from coz.tables import Column
from coz.training.grpo_trainer import Answer
from coz.training.grpo_watch import page
from tests.interpolated import two_methods_at_two_scales

CELL = 64


class Words:
    fingerprint = {"name": "words", "weights": None}

    def load(self):
        pass

    def __call__(self, current, context, *, seeds=None):
        return [f"step with a context: {context is not None}" for _ in current]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """nn (direct) and coz_vlm at 4x and 16x of two photographs, each of one colour: red and blue."""
    root = tmp_path_factory.mktemp("outputs")
    (root / "photos").mkdir()
    for name, color in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.new("RGB", (64, 64), color).save(root / "photos" / f"{name}.png")
    photos = list_photos(path=root / "photos")
    metric = ConsistencyStep()
    columns = [Column(metric.name, metric.label, metric.higher_is_better)]
    for number, (method, scale, lineages) in enumerate(two_methods_at_two_scales(root / "states", photos, Words())):
        rows = measure(lineages, [], [metric], Labels(method, scale, "photos", "bicubic", "words", "embedded"))
        record = JobRecord([f"method={method}", f"scale={scale:g}"], [], columns, {"red": "painted here"})
        save_job(root / "run" / f"job_{number}", record, rows)
    return root / "run"


def drawn(*arguments, out):
    assert main([*map(str, arguments), "--cell-px", str(CELL), "--out", str(out)]) == 0
    with Image.open(out) as image:
        return image.convert("RGB"), dict(image.text)


def test_strips_have_a_row_per_photograph_and_a_column_per_scale(run, tmp_path):
    image, note = drawn("strips", run, out=tmp_path / "a.png")
    row_px = CELL + LINE_PX + 12 + GAP_PX  # one photograph has a credit
    assert image.size == (GAP_PX + 3 * (CELL + GAP_PX), GAP_PX + 2 * TEXT_PX + 2 * row_px)
    assert (note["Warning"], note["Scale"], note["Prompter"]) == (INVENTED, "4x, 16x", "words")
    top = GAP_PX + 2 * TEXT_PX + CELL // 2
    rows = [image.getpixel((GAP_PX + CELL // 2, top + row * row_px)) for row in (0, 1)]
    assert sorted(max(range(3), key=pixel.__getitem__) for pixel in rows) == [0, 2]  # one red, one blue
    single, _ = drawn("strips", run, "--photos", "red", "--scales", 16, out=tmp_path / "b.png")
    assert single.size == (GAP_PX + 2 * (CELL + GAP_PX), GAP_PX + 2 * TEXT_PX + row_px)


def test_the_grid_has_a_column_per_method(run, tmp_path):
    image, note = drawn("grid", run, "--photos", "blue", "--methods", "Nearest=nn", out=tmp_path / "a.png")
    assert image.size == (GAP_PX + 2 * (CELL + GAP_PX), GAP_PX + 2 * LINE_PX + 6 + 2 * (CELL + GAP_PX))  # "(a) Nearest" wraps
    assert note["Scale"] == "4x, 16x"
    assert image.getpixel((GAP_PX + CELL + GAP_PX + CELL // 2, image.height - GAP_PX - CELL // 2)) == (0, 0, 200)
    whole, _ = drawn("grid", run, out=tmp_path / "b.png")
    assert whole.width == GAP_PX + 3 * (CELL + GAP_PX)


def test_prompts_show_only_what_was_asked(run, tmp_path):
    image, note = drawn("prompts", run, "--photo", "red", out=tmp_path / "a.png")
    row_px = TEXT_PX + 12 + CELL + PROMPT_LINES * LINE_PX + 8 + GAP_PX
    methods = 2  # Words answers nn as well
    assert image.size == (GAP_PX + 3 * (CELL + GAP_PX), GAP_PX + 2 * TEXT_PX + methods * row_px)
    one, _ = drawn("prompts", run, "--photo", "red", "--methods", "ours=coz_vlm", out=tmp_path / "b.png")
    assert one.height == image.height - row_px
    assert note["Prompter"] == "words"


def test_a_chain_knows_where_each_state_lies(run):
    results = read_results([run])
    chain = deepest_chain(results, "red", "coz_vlm")
    assert [shot.scale for shot in chain.shots] == [4, 16]
    assert chain.shots[0].region == Region(0.375, 0.375, 0.25)
    assert chain.shots[1].region == Region(0.46875, 0.46875, 0.0625)
    assert chain.shots[1].prompt == "step with a context: True"
    assert read_chain(results.states, "gone") is None
    assert choose_methods(results, ["ours=coz_vlm", "nn"]) == {"coz_vlm": "ours", "nn": "NN Interpolation"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["strips", "RUN", "--photos", "green"], "no photograph green in these runs; they hold blue, red"),
        (["strips", "RUN", "--method", "direct"], "no method direct in these runs; they hold nn, coz_vlm"),
        (["grid", "RUN", "--scales", "64"], "no scale 64 in these runs; they hold 4, 16"),
        (["prompts", "RUN", "--scales", "5"], "no state at 5x in these chains; they have 4, 16"),
        (["grid", "RUN/none"], "does not exist; give the folder that evaluate.py named"),
        (["failures", "RUN"], "holds no completions; give the folder of a run of train_grpo.py"),
        (["rewards", "RUN"], "holds no rewards.csv"),
    ],
)
def test_a_mistake_ends_in_one_sentence(run, capsys, arguments, sentence):
    assert main([argument.replace("RUN", str(run)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["grid", "x", "--out", "a.jpg"], "a.jpg must end in .png"),
        (["grid", "x", "--scales", "one"], "invalid magnification value: 'one'"),
        (["grid", "x", "--cell-px", "9"], "9 must lie between 32 and 1024"),
    ],
)
def test_a_mistyped_argument_is_refused(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# drawing


def test_text_is_wrapped_to_a_width():
    text = "fur " * 50
    lines = wrap(text, 200, lines=3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(font().getlength(line) <= 200 for line in lines)
    assert wrap("two words", 500, lines=3) == ["two words"]
    assert wrap("", 500, lines=3) == []
    (long,) = wrap("x" * 300, 100, lines=2)
    assert long.endswith("…")
    assert font().getlength(long) <= 100


def test_a_box_encloses_its_region_and_a_tiny_one_still_shows():
    from PIL import ImageDraw

    def box(region):
        image = Image.new("RGB", (100, 100), "black")
        draw_box(ImageDraw.Draw(image), (0, 0), 100, region, "#ff0000")
        return np.argwhere((np.asarray(image) == (255, 0, 0)).all(2))

    red = box(Region(0.25, 0.5, 0.25))
    assert red.min(0).tolist() == [50, 25]
    assert red.max(0).tolist() == [74, 49]
    assert len(box(Region(0.5, 0.5, 0.001))) > 20


# ---------------------------------------------------------------------------------------------------------------------
# appendix J


def answer(level, text, **rewards):
    return Answer([Image.new("RGB", (8, 8), (level, 0, 0)), Image.new("RGB", (8, 8), (0, level, 0))], text, rewards)


@pytest.fixture
def grpo_run(tmp_path):
    before = [
        answer(10, "fur fur fur", critic=0.3, phrase=1.0, repetition=-0.9),
        answer(90, "The second image shows <fur> & more", critic=0.2, phrase=0.0, repetition=0.0),
        answer(170, "ant leg", critic=0.1, phrase=1.0, repetition=0.0),
        answer(250, "", critic=float("nan"), phrase=0.0, repetition=-0.1),
    ]
    after = [
        answer(170, "crab claw", critic=0.9, phrase=1.0, repetition=0.0),  # in another order
        answer(10, "fur", critic=0.3, phrase=1.0, repetition=0.0),
        answer(90, "feathers", critic=0.2, phrase=1.0, repetition=0.0),
        answer(250, "sky", critic=0.2, phrase=1.0, repetition=0.0),
    ]
    folder = tmp_path / "grpo" / "completions"
    folder.mkdir(parents=True)
    for step, answers in ((0, before), (40, after)):
        (folder / f"step_{step:06d}.html").write_text(page(answers, step=step, weights=[1.0, 0.5, 0.5]))
    return tmp_path / "grpo"


def test_completions_are_read_back_from_their_page(grpo_run):
    assert completion_steps(grpo_run) == [0, 40]
    first, second, _, empty = read_completions(grpo_run, 0)
    assert (first.text, second.text, empty.text) == ("fur fur fur", "The second image shows <fur> & more", "")
    assert first.rewards == {"critic": 0.3, "phrase": 1.0, "repetition": -0.9, "total": 0.35}


def test_each_reward_gets_the_pair_that_it_changed(grpo_run):
    examples = choose_examples(read_completions(grpo_run, 0), read_completions(grpo_run, 40))
    assert [(e.reward, e.before.text, e.after.text) for e in examples] == [
        ("repetition", "fur fur fur", "fur"),
        ("phrase", "The second image shows <fur> & more", "feathers"),
        ("critic", "ant leg", "crab claw"),
    ]
    image = draw_failures(examples, steps=(0, 40))
    assert image.width == FIGURE_PX
    assert image.height > draw_failures(examples[:2], steps=(0, 40)).height


def test_the_command_draws_them(grpo_run, capsys):
    assert main(["failures", str(grpo_run)]) == 0
    with Image.open(grpo_run / "failures.png") as image:
        assert image.width == FIGURE_PX
    assert main(["failures", str(grpo_run), "--before", "20"]) == 2
    assert "kept no completions of step 20; it has those of 0, 40" in capsys.readouterr().err
    assert main(["failures", str(grpo_run), "--before", "40"]) == 2
    assert "before=40 must be a step before after=40" in capsys.readouterr().err
    (grpo_run / "completions" / "step_000040.html").write_text("<table><tr><th>a</th></tr><tr><td>b</td></tr></table>")
    assert main(["failures", str(grpo_run)]) == 2
    assert "is no page of completions" in capsys.readouterr().err
