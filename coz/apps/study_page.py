"""The study's web page: one page per photograph, the conditions in random order and without names, five grades each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import parse_qs

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from coz.apps.study_material import Material, Sample
from coz.apps.study_store import Shown, StudyStore
from coz.apps.viewer import LocalOnly

# Appendix D of arXiv 2505.18600, word for word.
INSTRUCTIONS = {
    "image": "In this survey, several samples will be given where we zoom into the center of the image. For each sequence of "
    "zoom, please rate how preferable the zoom is. (i.e., If we zoom into this input image, will the images look like this "
    "sequence?)",
    "text": "In this section, several samples will be given where we try to explain the center of the image. For each image, "
    "please rate how preferable the explanation is. (i.e., Does the text explanation well explain what is in the white box?)",
}
GRADES = ("Very Bad", "Bad", "Neutral", "Good", "Very Good")  # the paper names the ends; 1 to 5
_MAX_BODY = 10_000

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 12px 16px 48px; max-width: 1100px; font: 17px/1.5 system-ui, sans-serif; color: #1a1a1a; }
.sequence { display: flex; gap: 8px; overflow-x: auto; }
figure { margin: 0; flex: 1 0 150px; max-width: 260px; }
figure.one { max-width: 420px; position: relative; }
img { width: 100%; display: block; background: #eee; aspect-ratio: 1; object-fit: cover; }
figure svg { position: absolute; inset: 0; width: 100%; height: 100%; }
fieldset { border: 1px solid #ccc; border-radius: 8px; margin: 16px 0; padding: 8px 12px; min-width: 0; }
blockquote { margin: 8px 0; padding: 8px 12px; background: #f4f4f2; overflow-wrap: anywhere; }
.grades { display: flex; flex-wrap: wrap; gap: 4px 8px; margin-top: 8px; }
.grades label { padding: 10px 12px; border: 1px solid #ccc; border-radius: 6px; cursor: pointer; }
button, .button { font: inherit; padding: 12px 24px; border: 0; border-radius: 8px; background: #c43e17; color: #fff; }
a { color: #c43e17; } .note { color: #666; font-size: .9rem; overflow-wrap: anywhere; }
:focus-visible, label:has(:focus-visible) { outline: 3px solid #4361ee; outline-offset: 1px; }
"""


def build_app(material: Material, store: StudyStore, *, sets: Mapping[str, int]) -> FastAPI:
    """The server of a study.

    Args:
        sets: part → photographs that each person rates.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/", response_class=HTMLResponse)
    def welcome() -> str:
        return _frame(_welcome(sets, len(material.conditions)))

    @app.post("/start")
    def start() -> Response:
        return RedirectResponse(f"/s/{store.enrol(material, sets=sets)}", status_code=303)

    @app.get("/s/{token}")
    def resume(token: str) -> Response:
        missing = [item.page for item in _known(store, token) if item.score is None]
        return RedirectResponse(f"/s/{token}/{missing[0]}" if missing else f"/s/{token}/end", status_code=303)

    @app.get("/s/{token}/end", response_class=HTMLResponse)
    def end(token: str) -> str:
        if any(item.score is None for item in _known(store, token)):
            return _frame(f'<p>Some pages are not answered yet: <a href="/s/{escape(token)}">go on</a>.</p>')
        return _frame(f'<h1>Thank you</h1><p>All answers are kept. <a href="/s/{escape(token)}/0">Look at them again</a></p>')

    @app.get("/s/{token}/{page}", response_class=HTMLResponse)
    def show(token: str, page: int) -> str:
        shown = _known(store, token)
        items = [item for item in shown if item.page == page]
        if not items:
            raise HTTPException(404, "no such page")
        return _frame(_page(material, token, items, pages=1 + max(item.page for item in shown)))

    @app.post("/s/{token}/{page}")
    async def answer(token: str, page: int, request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_BODY:
                raise HTTPException(413, "that is no answer of this page")
        fields = parse_qs(body.decode("ascii", "replace"))
        try:
            scores = [int(fields[f"score{place}"][0]) for place in range(len(material.conditions))]
            await run_in_threadpool(store.rate, token, page, scores)
        except (KeyError, ValueError) as error:
            raise HTTPException(400, "please grade every sample; go back, your other answers are kept") from error
        return RedirectResponse(f"/s/{token}", status_code=303)

    @app.get("/s/{token}/{page}/{place}/{picture}.png")
    def picture(token: str, page: int, place: int, picture: int) -> FileResponse:
        # The address names a place on a rater's page, so it tells nothing of the condition.
        item = next((item for item in _known(store, token) if (item.page, item.place) == (page, place)), None)
        if item is None:
            raise HTTPException(404, "no such picture")
        sample = material.samples[item.photo, item.condition]
        pictures = sample.pictures if item.part == "image" else (sample.text_picture,)
        if not 0 <= picture < len(pictures):
            raise HTTPException(404, "no such picture")
        return FileResponse(pictures[picture], media_type="image/png", headers={"Cache-Control": "private, max-age=86400"})

    app.add_middleware(LocalOnly)
    return app


def _known(store: StudyStore, token: str) -> list[Shown]:
    shown = store.shown(token)
    if not shown:
        raise HTTPException(404, "no such rater; begin at the first page")
    return shown


def _frame(content: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        'initial-scale=1"><meta name="robots" content="noindex"><link rel="icon" href="data:,"><title>Survey</title>'
        f"<style>{_STYLE}</style></head><body>{content}</body></html>"
    )


def _welcome(sets: Mapping[str, int], samples: int) -> str:
    return (
        f"<h1>Survey</h1><p>{sets['image']} pages show zooms into pictures, {sets['text']} pages texts about pictures, "
        f"{samples} samples each. No data about you are kept, only your grades. You may stop at any time; the address of "
        'your page, which comes after the button, takes you back to where you were.</p><form method="post" action="/start">'
        "<button>Begin</button></form>"
    )


def _page(material: Material, token: str, items: Sequence[Shown], *, pages: int) -> str:
    page, part = items[0].page, items[0].part
    samples = [material.samples[item.photo, item.condition] for item in items]
    content = _sequences if part == "image" else _texts
    address = f"/s/{escape(token)}/{page}"
    back = f'<a href="/s/{escape(token)}/{page - 1}">back</a> ' if page else ""
    note = "To go on later, keep the address of this page." if page == 0 else ""
    return (
        f'<p class="note">{back}page {page + 1} of {pages}. {note}</p><p>{INSTRUCTIONS[part]}</p>'
        f'<form method="post" action="{address}" autocomplete="off">{content(address, items, samples)}'
        "<button>Next</button></form>"
    )


def _sequences(address: str, items: Sequence[Shown], samples: Sequence[Sample]) -> str:
    blocks = []
    for item, sample in zip(items, samples, strict=True):
        figures = "".join(
            f'<figure><img src="{address}/{item.place}/{index}.png" alt="{"input" if index == 0 else f"zoom {scale:g}×"}">'
            f"<figcaption>{'input' if index == 0 else f'{scale:g}×'}</figcaption></figure>"
            for index, scale in enumerate(sample.scales)
        )
        blocks.append(_block(item, f'<div class="sequence" tabindex="0">{figures}</div>'))
    return "".join(blocks)


def _texts(address: str, items: Sequence[Shown], samples: Sequence[Sample]) -> str:
    """One picture above all texts where all describe the same, else each text's own."""
    same = len({(sample.text_picture, sample.box) for sample in samples}) == 1
    shared = _boxed(f"{address}/0/0.png", samples[0]) if same else ""
    blocks = [
        _block(item, ("" if same else _boxed(f"{address}/{item.place}/0.png", sample)) + _quote(sample))
        for item, sample in zip(items, samples, strict=True)
    ]
    return shared + "".join(blocks)


def _quote(sample: Sample) -> str:
    return f"<blockquote>{escape(sample.text)}</blockquote>"


def _boxed(source: str, sample: Sample) -> str:
    left, top, side = sample.box
    rect = f'<rect x="{left:.4f}" y="{top:.4f}" width="{side:.4f}" height="{side:.4f}" fill="none"'
    lines = f'{rect} stroke="#000" stroke-opacity="0.5" stroke-width="0.016"/>{rect} stroke="#fff" stroke-width="0.009"/>'
    drawing = f'<svg viewBox="0 0 1 1" aria-hidden="true">{lines}</svg>'
    return f'<figure class="one"><img src="{source}" alt="picture with a white box">{drawing}</figure>'


def _block(item: Shown, content: str) -> str:
    grades = ""
    for score, name in enumerate(GRADES, start=1):
        checked = " checked" if item.score == score else ""
        button = f'<input type="radio" name="score{item.place}" value="{score}" required{checked}>'
        grades += f"<label>{button} {name}</label>"
    legend = f"<legend>Sample {item.place + 1}</legend>"
    return f'<fieldset>{legend}{content}<div class="grades">{grades}</div></fieldset>'
