"""The report of a run: everything in one file, nothing from outside, the numbers those of the rows."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from coz.data.photos import list_photos
from coz.errors import UserError
from coz.measuring import Labels, measure, row_order
from coz.metrics import ConsistencyInput, ConsistencyStep
from coz.report.__main__ import main, write_report
from coz.report.curves import draw_curves, ticks
from coz.report.gallery import rank
from coz.report.pictures import Pictures
from coz.report.prompt_statistics import statistics_of, words_of
from coz.report.reading import StateFolder, paper_values, read_results
from coz.results import JobRecord, save_job
from coz.stages import Failure
from coz.store import write_json
from coz.tables import Cell, Column, Refusal
from tests.interpolated import two_methods_at_two_scales


class Brightness:
    """Stands in for NIQE, whose pictures must be larger."""

    name, label, higher_is_better, worst, identity = "niqe", "NIQE", False, 100.0, {"metric": "brightness"}

    def __call__(self, sample):
        return float(np.asarray(Image.open(sample.image)).mean())


METRICS = [ConsistencyStep(), ConsistencyInput(), Brightness()]
EVIL = "<script>alert(1)</script>"


class Words:
    """A prompter that says the step, and markup that must not become any."""

    @property
    def fingerprint(self):
        return {"name": "words", "weights": None}

    def load(self):
        pass

    def __call__(self, current, context, *, seeds=None):
        return [f"a small bird {EVIL}" for _ in current]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Two methods at two scales of three photographs, one of which fails at 16x, as evaluate.py leaves them."""
    root = tmp_path_factory.mktemp("outputs")
    (root / "photos").mkdir()
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c&d"):
        pixels = np.kron(generator.integers(0, 255, (9, 9, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        Image.fromarray(pixels).save(root / "photos" / f"{name}.png")
    photos = list_photos(path=root / "photos")
    columns = [Column(metric.name, metric.label, metric.higher_is_better) for metric in METRICS]
    made = two_methods_at_two_scales(root / "states", photos, Words())
    for number, (method, scale, lineages) in enumerate(made):
        failures = [Failure("b", "the net broke")] if scale == 16 and method == "nn" else []
        lineages = [lineage for lineage in lineages if lineage.photo.name not in {f.photo for f in failures}]
        labels = Labels(method, scale, "photos", "bicubic", "words", "embedded")
        rows = sorted(measure(lineages, failures, METRICS, labels), key=row_order)
        folder = root / "evaluate" / "run" / f"job_{number}"
        refusals = [Refusal("no such package", metric="niqe")] if number == 0 else []
        record = JobRecord([f"method={method}", f"scale={scale:g}"], refusals, columns, {"a": "made here"})
        save_job(folder, record, rows)
        write_json(folder / "timing.json", {"states_computed": 3, "seconds": 1.5})
        write_json(folder / "provenance.json", {"command": ["evaluate.py"], "commit": "abc", "versions": {"torch": "2.9"}})
        (folder / "config.yaml").write_text("seed: 0\nprompter:\n  api_key: hush\n  max_new_tokens: 128\n")
    return root


@pytest.fixture(scope="module")
def page(outputs):
    assert main([str(outputs / "evaluate" / "run"), "--out", str(outputs / "report.html")]) == 0
    return (outputs / "report.html").read_text()


class Outline(HTMLParser):
    """Checks that elements close in order, and keeps attributes."""

    void = {"meta", "input", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(page):
    outline = Outline()
    outline.feed(page)
    assert not outline.open
    assert {"tables", "curves", "strips", "ranked", "prompts", "failures", "times", "provenance"} <= set(outline.ids)
    assert not [a for a in outline.attributes if a[1] in ("src", "srcset", "action")]
    assert all(value.startswith("#") for _, name, value in outline.attributes if name == "href")
    assert all(url.startswith('"data:image/jpeg') for url in re.findall(r"url\(([^)]{1,40})", page))
    assert "default-src 'none'" in page


def test_what_people_and_models_wrote_is_escaped(page):
    assert EVIL not in page
    assert "a small bird &lt;script&gt;" in page
    assert "c&amp;d" in page


def test_the_numbers_are_those_of_the_rows(outputs, page):
    results = read_results([outputs / "evaluate" / "run"])
    mine = [row for row in results.found.rows if (row["method"], row["scale"]) == ("coz_vlm", 16)]
    values = [row["value"] for row in mine if row["metric"] == "consistency_input"]
    assert len(values) == 3
    assert f"{np.mean(values):.4f} [" in page
    assert "12.1252" in page  # the paper's NN at 4x on DIV2K stands beside them
    assert "the net broke" in page
    assert "niqe could not run: no such package" in page


def test_provenance_is_told_without_secrets(page):
    assert "commit: abc" in page
    assert "hush" not in page
    assert "max_new_tokens: 128" in page
    assert "made here" in page


def test_each_picture_lies_in_the_page_once_and_small(outputs, page):
    rules = re.findall(r"\.(s-[0-9a-f]{20})\{background", page)
    assert len(rules) == len(set(rules)) >= 3 * 4
    used = set(re.findall(r"s-[0-9a-f]{20}", page.split("</style>")[1]))
    assert used == set(rules)


def test_strips_hold_the_states_of_their_method(outputs, page):
    results = read_results([outputs / "evaluate" / "run"])
    told = [json.loads(text.replace("&quot;", '"')) for text in re.findall(r'data-states="([^"]*)"', page)]
    assert len(told) == 3 * 2
    keys = results.keys("a")
    assert {"nn": f"s-{keys['nn', 16.0]}", "coz_vlm": f"s-{keys['coz_vlm', 16.0]}"} in told


def test_budgets_hold(outputs, tmp_path):
    run = outputs / "evaluate" / "run"
    small = write_report([run], out=tmp_path / "small.html", pictures=2, ranked=1, photos=1).read_text()
    assert len(re.findall(r"\.s-\w+\{", small)) == 2
    assert "did not fit the budget" in small
    assert "2 more photographs have strips" in small
    states = StateFolder(outputs / "states")
    pictures = Pictures(states, limit=10, side_px=32, quality=80, max_mb=1e-6)
    keys = list(read_results([run]).keys("a").values())
    assert [pictures.embed(key) is not None for key in keys[:3]] == [True, False, False]
    once = Pictures(states, limit=1, side_px=32, quality=80, max_mb=1)
    assert once.embed(keys[0]) == once.embed(keys[0]) == f"s-{keys[0]}"  # shown again, it costs nothing
    assert once.refused == 0


def test_the_same_run_gives_the_same_page(outputs, page, tmp_path):
    assert write_report([outputs / "evaluate" / "run"], out=tmp_path / "again.html").read_text() == page


def test_without_states_the_numbers_stay(outputs, tmp_path):
    shutil.copytree(outputs / "evaluate" / "run", tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "state store was not found" in page
    assert "12.1252" in page
    assert ".s-" not in page


def test_mistakes_end_in_one_sentence(outputs, tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert main([str(outputs / "photos")]) == 2
    assert "job.json" in capsys.readouterr().err
    with pytest.raises(UserError, match="ranked"):
        write_report([outputs / "evaluate" / "run"], out=tmp_path / "x.html", ranked=-1)
    assert main([str(outputs / "evaluate" / "run"), "--states", str(tmp_path / "no")]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# known answers


def test_prompt_statistics():
    assert words_of("A bird's eye, close-up; 2 feathers_") == ["a", "bird's", "eye", "close-up", "2", "feathers"]
    told = statistics_of(["red cat", "red cat", "blue", ""], before=["red dog", "red cat", "sky", "sky"])
    assert (told.n, told.empty) == (4, 1)
    assert told.words_mean == pytest.approx(5 / 4)
    assert told.words_sd == pytest.approx(np.std([2, 2, 1, 0], ddof=1))
    assert told.different == pytest.approx(3 / 4)
    assert told.distinct_words == pytest.approx(3 / 5)
    assert told.new_words == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert np.isnan(statistics_of(["one"]).words_sd)


def test_ranks():
    rows = [{"image": name, "value": value, "failure": ""} for name, value in (("a", 3.0), ("b", 1.0), ("c", 2.0), ("d", 9.0))]
    rows.append({"image": "e", "value": 0.0, "failure": "broke"})
    best, worst = rank(rows, Column("niqe", "NIQE", False), limit=2)
    assert [row["image"] for row in best] == ["b", "c"]
    assert [row["image"] for row in worst] == ["e", "d"]
    best, worst = rank(rows[:3], Column("psnr", "PSNR", True), limit=10)
    assert ([row["image"] for row in best], [row["image"] for row in worst]) == (["a", "c"], ["b"])


def test_ticks_and_curves():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3.1, 27.4) == [5, 10, 15, 20, 25]
    assert ticks(2, 2) == [2]
    nan = float("nan")
    cells = {(4.0, "nn"): Cell(1, 5.0, nan, nan, 0), (64.0, "nn"): Cell(1, 5.0, nan, nan, 0)}
    drawing = draw_curves("NIQE", cells, ["nn"])
    assert drawing.count("<circle") == 2
    assert "nan" not in drawing.split("<title>")[0]


def test_the_papers_table():
    (row,) = [row for row in paper_values([(256.0, "coz_vlm")], ["niqe"]) if row["dataset"] == "DIV8K"]
    assert (row["niqe"], row["musiq"], row["maniqa"], row["clipiqa"]) == ("9.6405", "47.25", "0.5646", "0.6041")
    assert paper_values([(4.0, "nn")], ["consistency_step"]) == []


# ---------------------------------------------------------------------------------------------------------------------
# in a browser


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(outputs, page, width):
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_context(viewport={"width": width, "height": 800}).new_page()
        requests, errors = [], []
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.goto((outputs / "report.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out on a phone
        right = tab.locator(".strip").first.locator(".right").first
        before = right.evaluate("e => getComputedStyle(e).backgroundImage")
        assert before.startswith('url("data:image/jpeg')
        tab.locator(".strip select").nth(1).select_option("nn")
        assert right.evaluate("e => getComputedStyle(e).backgroundImage") != before
        slider = tab.locator(".strip input").first
        slider.focus()
        for _ in range(10):
            tab.keyboard.press("ArrowRight")
        assert "60%" in right.evaluate("e => getComputedStyle(e).clipPath")
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
        assert errors == []
        browser.close()


# ---------------------------------------------------------------------------------------------------------------------
# GRPO runs


def test_a_grpo_run_gets_its_curves_and_answers(outputs, tmp_path):
    from coz.training.grpo_trainer import Answer
    from coz.training.grpo_watch import page as completions_page

    run = tmp_path / "tuned"
    (run / "completions").mkdir(parents=True)
    lines = [f"{step},validation,{name},{value}" for name in ("phrase", "total") for step, value in ((0, 0.25), (20, 0.75))]
    (run / "rewards.csv").write_text("\n".join(["step,split,name,value", *lines]) + "\n")
    for step, text, phrase in ((0, f"The first image {EVIL}", 0.0), (20, "fur", 1.0)):
        answers = [Answer([Image.new("RGB", (8, 8))] * 2, text, {"phrase": phrase})]
        html = completions_page(answers, step=step, weights=[1.0])
        (run / "completions" / f"step_{step:06d}.html").write_text(html)
    both = write_report([outputs / "evaluate" / "run", run], out=tmp_path / "both.html").read_text()
    alone = write_report([run], out=tmp_path / "alone.html").read_text()
    for text in (both, alone):
        outline = Outline()
        outline.feed(text)
        assert not outline.open
        assert "Phrase Exclusion Reward" in text
        assert "tuned, step 20: 0.7500" in text
        assert "The first image &lt;script&gt;" in text
        assert EVIL not in text
    assert 'id="tables"' in both
    assert 'id="tables"' not in alone
    assert "<h1>run, tuned</h1>" in both
