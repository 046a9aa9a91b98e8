"""The web page in a real browser, and what must not harm it. Screenshots go to docs/images with COZ_SCREENSHOTS=1."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio")
sync_api = pytest.importorskip("playwright.sync_api", reason="the page's test needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]

ROOT = Path(__file__).resolve().parents[1]
WAIT_MS = 120_000


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The page's address; bicubic, so that the test is quick."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outputs = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "coz.apps.demo", f"port={port}", f"outputs={outputs}", "backbone=bicubic", "state_px=256"]
    with open(outputs / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(address, timeout=2).close()
            break
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, (outputs / "log").read_text()
            time.sleep(0.2)
    yield address
    process.terminate()
    process.wait(20)
    assert "Traceback" not in (outputs / "log").read_text()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    page = opened(browser, server)
    outside = []
    page.on("request", lambda request: outside.append(request.url) if not is_local(request.url, server) else None)
    yield page
    page.context.close()
    assert not outside


def is_local(url, server):
    return url.startswith((server, "data:", "blob:"))


def opened(browser, server):
    page = browser.new_context(viewport={"width": 1400, "height": 1500}).new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(server)
    page.locator("#samples img").first.wait_for()
    return page


def choose(page, name):
    page.locator("#samples button", has_text=name).click()
    page.locator("#photo img").wait_for()
    page.wait_for_timeout(700)


def click_at(page, x, y):
    """Click a point of the photograph, given as fractions; the picture lies centred in its frame."""
    image = page.locator("#photo img")
    box = image.bounding_box()
    width, height = image.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    scale = min(box["width"] / width, box["height"] / height)
    left = box["x"] + (box["width"] - width * scale) / 2
    top = box["y"] + (box["height"] - height * scale) / 2
    page.mouse.click(left + x * width * scale, top + y * height * scale)


def finished(page, status="#status"):
    sync_api.expect(page.locator(status)).to_contain_text("finished", timeout=WAIT_MS)


def number(page, name):
    return float(page.locator(f"#{name} input[type=number]").input_value())


def snapshot(page, name):
    if os.environ.get("COZ_SCREENSHOTS"):
        folder = ROOT / "docs" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(800)
        page.screenshot(path=folder / f"{name}.jpg", full_page=True, type="jpeg", quality=82)


def expect_error(page, words):
    sync_api.expect(page.locator(".toast-body, .toast-wrap").last).to_contain_text(re.compile(words), timeout=WAIT_MS)


def test_click_three_steps_edit_film(page):
    choose(page, "nuthatch")
    click_at(page, 0.45, 0.5)
    page.wait_for_function("Math.abs(document.querySelector('#x input[type=number]').value - 0.45) < 0.01")
    assert number(page, "y") == pytest.approx(0.5, abs=0.01)
    page.locator("#zoom").click()
    finished(page)
    for step in (1, 2, 3):
        assert page.locator(f"#image{step} img").is_visible()
        assert page.locator(f"#prompt{step} textarea").input_value()
    assert not page.locator("#step4").is_visible()
    snapshot(page, "demo_zoom")
    third = page.locator("#prompt3 textarea").input_value()
    page.locator("#prompt2 textarea").fill("feathers of a small bird")
    page.locator("#again2").click()
    page.locator("#status", has_text="working").wait_for()
    finished(page)
    assert page.locator("#prompt2 textarea").input_value() == "feathers of a small bird"
    assert page.locator("#prompt3 textarea").input_value() == third  # bicubic reads no prompt
    page.locator("#make-film").click()
    video = page.locator("#film video")
    video.wait_for()
    page.wait_for_function("document.querySelector('#film video').readyState >= 1")
    assert video.evaluate("video => video.duration") == pytest.approx(3 * 2.5 + 1.5, abs=0.1)
    page.locator("#pack").click()
    page.locator("#archive a").first.wait_for()
    snapshot(page, "demo_film")


def test_whole_picture(page):
    choose(page, "cat")
    page.get_by_role("tab", name="Whole picture").click()
    page.locator("#enlarge").click()
    finished(page, "#whole-status")
    assert "1804 x 1200 px" in page.locator("#whole-status").inner_text()
    frame = page.frame_locator("#viewer iframe")
    frame.locator("#viewer canvas").first.wait_for()
    handle = page.locator("#viewer iframe").element_handle().content_frame()
    handle.wait_for_function("window.viewer && viewer.world.getItemCount() && viewer.world.getItemAt(0).getFullyLoaded()")
    frame.locator("#in").press("Enter")  # by keyboard
    handle.wait_for_function("viewer.viewport.getZoom() > 1.5")
    handle.wait_for_function("viewer.world.getItemAt(0).getFullyLoaded()")
    page.locator("#tiff a").first.wait_for()
    snapshot(page, "demo_whole")


def test_by_keyboard(page):
    page.locator("#samples button", has_text="cat").focus()
    page.keyboard.press("Enter")
    page.locator("#photo img").wait_for()
    page.locator("#x input[type=number]").fill("0.3")
    page.locator("#steps input[type=number]").fill("1")
    page.keyboard.press("Tab")
    page.locator("#zoom").focus()
    page.keyboard.press("Enter")
    finished(page)
    assert not page.locator("#step2").is_visible()


def test_upload(page, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "mine.png")
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "mine.png")
    page.locator("#photo img").wait_for()
    page.locator("#zoom").click()
    finished(page)


def flat_png(path, side):
    """A black PNG of any size, written without holding it."""
    row = b"\0" + bytes(side // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_what_is_no_usable_picture_is_refused(page, tmp_path):
    flat_png(tmp_path / "huge.png", 30_000)
    (tmp_path / "letter.txt").write_text("Dear Sir")
    (tmp_path / "fake.png").write_text("Dear Madam")
    for name, words in (("huge.png", "60 megapixels"), ("letter.txt", "letter.txt"), ("fake.png", "fake.png")):
        page.locator("#upload input[type=file]").set_input_files(tmp_path / name)
        expect_error(page, words)
        page.reload()
        page.locator("#samples img").first.wait_for()
    page.locator("#zoom").click()
    expect_error(page, "choose a picture first")


def test_an_animated_gif_gives_its_first_frame(page, tmp_path):
    frames = [Image.new("RGB", (80, 60), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:], duration=100)
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "film.gif")
    page.locator("#photo img").wait_for()
    page.locator("#zoom").click()
    finished(page)


def test_two_users_at_once(browser, server):
    pages = [opened(browser, server) for _ in range(2)]
    for page, name, x in zip(pages, ("cat", "clock"), (0.2, 0.8), strict=True):
        choose(page, name)
        page.locator("#x input[type=number]").fill(str(x))
        page.locator("#x input[type=number]").press("Tab")
    for page in pages:
        page.locator("#zoom").click()
    for page, x in zip(pages, (0.2, 0.8), strict=True):
        finished(page)
        left, right = map(float, re.search(r"x ([\d.]+)-([\d.]+)", page.locator("#status").inner_text()).groups())
        assert left <= x <= right
    for page in pages:
        page.context.close()


def test_only_under_its_own_name(server):
    request = urllib.request.Request(server, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=10)
    for path in ("/coz/view/..%2f..%2fetc", "/coz/view/" + "0" * 20, "/coz/tiles/" + "0" * 20 + "/0/0_0.jpg"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(server + path, timeout=10)
