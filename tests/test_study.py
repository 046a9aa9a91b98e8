"""The preference study's page: blinded, in random order, resumable, nothing lost with fifty raters at once."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coz.apps import study
from coz.apps.study_material import read_material
from coz.apps.study_store import StudyStore
from coz.backbones.interpolation import Interpolation
from coz.chain import StepSettings
from coz.data.photos import list_photos
from coz.errors import UserError
from coz.evaluation import StateMaker
from coz.measuring import Labels, measure
from coz.metrics import ConsistencyStep
from coz.results import JobRecord, save_job
from coz.stages import Plan, plan_for
from coz.store import StateStore
from coz.tables import Column

CONDITIONS = {"single": "coz_vlm_single", "multi": "coz_vlm", "tuned": "coz_vlm[prompter.adapter=x]"}
SETS = {"image": 5, "text": 5}


class Says:
    def __init__(self, words):
        self.words = words

    @property
    def fingerprint(self):
        return {"name": "says", "weights": None, "words": self.words}

    def load(self):
        pass

    def __call__(self, current, context, *, seeds=None):
        return [self.words for _ in current]


def make_run(root, at="centre", photos=7, mode="chain"):
    (root / "photos").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in range(photos):
        Image.fromarray(generator.integers(0, 255, (70, 70, 3), dtype=np.uint8)).save(root / "photos" / f"photo{name}.png")
    for number, (method, words) in enumerate(zip(CONDITIONS.values(), ("a <b>cat</b>", "two cats", "cat's fur"), strict=True)):
        settings = StepSettings(backbone=Interpolation(resampling="bicubic"), prompter=Says(words))
        factors = plan_for(mode=mode if number == 1 else "chain", scale=16, max_factor=4, start_px=64)
        plan = Plan(factors=factors, start_px=64, at=at)
        lineages = StateMaker(store=StateStore(root / "states"), settings=settings, plan=plan).run(
            list_photos(path=root / "photos")
        )
        labels = Labels(method, 16, "photos", "bicubic", "vlm", "embedded")
        record = JobRecord(["scale=16"], [], [Column("consistency_step", "step", True)], {})
        save_job(root / "run" / f"job_{number}", record, list(measure(lineages, [], [ConsistencyStep()], labels)))
    return root / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def material(run):
    return read_material([run], CONDITIONS, text_step=1)


@pytest.fixture
def store(tmp_path, material):
    store = StudyStore(tmp_path / "ratings.sqlite")
    store.bind(material)
    return store


# ---------------------------------------------------------------------------------------------------------------------
# what is shown


def test_material(material):
    assert len(material.photos) == len(material.texts) == 7
    sample = material.samples["photo0", "tuned"]
    assert (len(sample.pictures), sample.scales, sample.text) == (3, (1.0, 4.0, 16.0), "cat's fur")
    left, top, side = sample.box
    assert side == 0.25
    assert abs(left - 0.375) + abs(top - 0.375) <= 2 / 64
    assert len({material.samples["photo0", name].text_picture for name in CONDITIONS}) == 1


def test_material_that_does_not_fit_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="coz_vlm_single"):
        read_material([run], {"a": "coz_vlm", "b": "nonsense"}, text_step=1)
    with pytest.raises(UserError, match="at least two"):
        read_material([run], {"a": "coz_vlm"}, text_step=1)
    with pytest.raises(UserError, match="1 to 2"):
        read_material([run], CONDITIONS, text_step=3)
    with pytest.raises(UserError, match="at=centre"):
        read_material([make_run(tmp_path / "aside", at=(0.2, 0.2), photos=1)], CONDITIONS, text_step=1)
    with pytest.raises(UserError, match="multi: 1, tuned: 2"):
        read_material([make_run(tmp_path / "mixed", mode="direct", photos=1)], CONDITIONS, text_step=1)


def test_each_page_shows_all_conditions_of_one_photograph(store, material):
    shown = store.shown(store.enrol(material, sets=SETS))
    assert [item.page for item in shown] == [page for page in range(10) for _ in range(3)]
    assert [item.part for item in shown] == ["image"] * 15 + ["text"] * 15
    for page in range(10):
        mine = [item for item in shown if item.page == page]
        assert len({item.photo for item in mine}) == 1
        assert {item.condition for item in mine} == set(CONDITIONS)
    for part in ("image", "text"):
        assert len({item.photo for item in shown if item.part == part}) == 5


def test_order_is_random_and_photographs_are_shared_out(store, material):
    raters = [store.shown(store.enrol(material, sets=SETS)) for _ in range(28)]
    firsts = [rater[3 * page].condition for rater in raters for page in range(10)]
    for condition in CONDITIONS:
        assert 55 < firsts.count(condition) < 135  # of 280; outside less than once in 10^5
    counts = [sum(item.photo == photo and item.part == "image" for r in raters for item in r) / 3 for photo in material.photos]
    assert counts == [20] * 7


def test_the_file_belongs_to_its_study(store, run, tmp_path):
    other = read_material([run], CONDITIONS, text_step=2)
    with pytest.raises(UserError, match="another --database"):
        store.bind(other)
    (tmp_path / "no.sqlite").write_text("Dear Sir, " * 200)
    with pytest.raises(UserError, match="no SQLite file"):
        StudyStore(tmp_path / "no.sqlite")


def test_a_page_is_kept_whole_or_not_at_all(store, material):
    token = store.enrol(material, sets=SETS)
    for scores in ([1, 2], [1, 2, 6], [0, 1, 2], [1, 2, 3, 4]):
        with pytest.raises(ValueError):
            store.rate(token, 0, scores)
    with pytest.raises(ValueError):
        store.rate("nobody", 0, [1, 2, 3])
    assert store.ratings() == []
    store.rate(token, 0, [1, 2, 3])
    store.rate(token, 0, [3, 2, 1])  # on second thoughts
    by_place = [item for item in store.shown(token) if item.page == 0]
    told = {r.condition: r.score for r in store.ratings()}
    assert told == {item.condition: score for item, score in zip(by_place, [3, 2, 1], strict=True)}


def test_nothing_of_a_person_is_stored(store, material):
    store.rate(store.enrol(material, sets=SETS), 0, [1, 2, 3])
    with sqlite3.connect(store.path) as database:
        names = {row[0] for row in database.execute("SELECT p.name FROM sqlite_master m, pragma_table_info(m.name) p")}
    assert names == {"name", "value", "id", "token", "rater", "page", "place", "part", "photo", "condition", "score"}


def test_the_instructions_are_the_papers():
    page = pytest.importorskip("coz.apps.study_page", reason="needs fastapi")
    paper = Path(__file__).resolve().parents[2] / "shared" / "PAPER.txt"
    if not paper.is_file():
        pytest.skip("the paper's text is not here")
    text = " ".join(paper.read_text().split())
    for instruction in page.INSTRUCTIONS.values():
        assert f"‘{instruction}’" in text


# ---------------------------------------------------------------------------------------------------------------------
# the page


@pytest.fixture
def server(material, store):
    pytest.importorskip("fastapi", reason="the page needs fastapi")
    uvicorn = pytest.importorskip("uvicorn", reason="the page needs uvicorn")
    from coz.apps.study_page import build_app

    config = uvicorn.Config(build_app(material, store, sets=SETS), host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


def call(address, form=None):
    """(final address, text) of a GET, or of a POST with a form."""
    data = None if form is None else urllib.parse.urlencode(form).encode()
    with urllib.request.urlopen(address, data=data, timeout=120) as response:
        return response.geturl(), response.read()


def answer_all(server, seed):
    """A whole visit, with a break in the middle. → (token, what was answered)."""
    generator = np.random.default_rng(seed)
    address, text = call(f"{server}/start", {})
    token, given = address.split("/s/")[1].split("/")[0], {}
    for page in range(10):
        assert address == f"{server}/s/{token}/{page}"
        given[page] = [int(score) for score in generator.integers(1, 6, 3)]
        address, text = call(address, {f"score{place}": score for place, score in enumerate(given[page])})
        if page == 4:
            address, text = call(f"{server}/s/{token}")  # came back
    assert b"Thank you" in text
    return token, given


def test_a_visit(server, material, store):
    token, given = answer_all(server, seed=0)
    shown = store.shown(token)
    assert {page: [item.score for item in shown if item.page == page] for page in range(10)} == given
    assert f'value="{given[0][0]}" required checked' in call(f"{server}/s/{token}/0")[1].decode()


def test_pages_are_blind(server, material, store):
    address, text = call(f"{server}/start", {})
    token = address.split("/")[-2]
    for page in (0, 5):
        html = call(f"{server}/s/{token}/{page}")[1].decode()
        for name in (*CONDITIONS, *CONDITIONS.values(), *material.photos):
            assert name not in html
    assert "<b>cat</b>" not in html
    assert "a &lt;b&gt;cat&lt;/b&gt;" in html
    pictures = re.findall(r'src="([^"]+)"', text.decode())
    assert len(pictures) == 3 * 3
    item = store.shown(token)[0]
    assert call(server + pictures[1])[1] == material.samples[item.photo, item.condition].pictures[1].read_bytes()


def test_wrong_requests_are_refused(server, store):
    token = call(f"{server}/start", {})[0].split("/")[-2]
    wrong = [
        (f"{server}/s/nobody/0", None, 404),
        (f"{server}/s/{token}/10", None, 404),
        (f"{server}/s/{token}/0/0/9.png", None, 404),
        (f"{server}/s/{token}/0/0/-1.png", None, 404),
        (f"{server}/s/{token}/0", {"score0": 1, "score1": 2}, 400),
        (f"{server}/s/{token}/0", {"score0": 1, "score1": 2, "score2": 9}, 400),
        (f"{server}/s/{token}/0", {"score0": 1, "score1": 2, "score2": "x" * 20_000}, 413),
        (f"{server}/docs", None, 404),
    ]
    for address, form, status in wrong:
        with pytest.raises(urllib.error.HTTPError) as caught:
            call(address, form)
        assert caught.value.code == status, address
    assert store.ratings() == []


def test_fifty_raters_at_once(server, store):
    with ThreadPoolExecutor(50) as pool:
        visits = list(pool.map(lambda seed: answer_all(server, seed), range(50)))
    assert len({token for token, _ in visits}) == 50
    assert len(store.ratings()) == 50 * 10 * 3
    for token, given in visits:
        shown = store.shown(token)
        assert {page: [item.score for item in shown if item.page == page] for page in range(10)} == given


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_the_analysis_command(store, material, capsys):
    generator = np.random.default_rng(0)
    for _ in range(8):
        token = store.enrol(material, sets=SETS)
        for page in range(10):
            own = [item.condition for item in store.shown(token) if item.page == page]
            store.rate(token, page, [5 if name == "tuned" else int(generator.integers(1, 4)) for name in own])
    assert study.main(["analyse", "--database", str(store.path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"image +\| tuned +\| 40 +\| 5\.000", said)
    assert "***" in said
    assert (store.path.parent / "study.png").stat().st_size > 1000
    lines = (store.path.parent / "ratings.csv").read_text().splitlines()
    assert len(lines) == 1 + 8 * 30


def test_the_commands_mistakes(run, tmp_path, capsys):
    assert study.main(["analyse", "--database", str(tmp_path / "none.sqlite")]) == 2
    StudyStore(tmp_path / "empty.sqlite")
    assert study.main(["analyse", "--database", str(tmp_path / "empty.sqlite")]) == 2
    given = ["serve", str(run), "--database", str(tmp_path / "new.sqlite"), "--conditions"]
    assert study.main([*given, "multi"]) == 2
    assert study.main([*given, *(f"{k}={v}" for k, v in CONDITIONS.items()), "--image-sets", "99"]) == 2
    assert "99" in capsys.readouterr().err
    assert not (tmp_path / "new.sqlite").exists()
