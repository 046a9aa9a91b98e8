"""The page itself: Gradio's components, and what happens when they are used."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import gradio as gr
from PIL import Image

from coz.apps.studio import MAX_STEPS, Request, Studio
from coz.data.photos import Photo
from coz.enlarging import Enlargement
from coz.errors import UserError

CSS = """
.gradio-container { max-width: 1500px !important; }
#viewer iframe { width: 100%; height: 640px; border: 0; border-radius: 8px; }
footer { display: none !important; }
"""
# No web fonts: the page fetches nothing from outside.
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
_BUTTONS = ["download", "fullscreen"]  # and none that shares: it would send the picture elsewhere
_TIFF_LIMIT_PX = 300_000_000  # writing a larger one takes minutes; the command does it


def build_page(studio: Studio, *, samples: Sequence[Photo], backbones: Sequence[str], prompters: Sequence[str]) -> gr.Blocks:
    """The page.

    Args:
        studio: what does the work.
        samples: photographs to choose from.
        backbones, prompters: their configs' names, the first chosen at the start.
    """
    with gr.Blocks(title="Chain-of-Zoom", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.Markdown("# Chain-of-Zoom\nDrop a picture or choose one, click where to zoom, and watch it come closer.")
        photo, request = gr.State(None), gr.State(None)
        with gr.Row():
            with gr.Column(scale=2):
                upload = gr.File(
                    label="Drop a picture here (PNG, JPEG, WebP, TIFF, BMP)", type="filepath", elem_id="upload", height=140
                )
                gallery = gr.Gallery(
                    [(_thumbnail(sample.path), sample.name) for sample in samples],
                    label="or choose one",
                    columns=6,
                    height=190,
                    allow_preview=False,
                    elem_id="samples",
                    format="jpeg",
                    buttons=[],
                )
                preview = gr.Image(
                    label="Click where to zoom", interactive=False, elem_id="photo", format="jpeg", buttons=[], height=480
                )
            with gr.Column(scale=1):
                x = gr.Slider(0, 1, 0.5, step=0.001, label="x: 0 left, 1 right", elem_id="x")
                y = gr.Slider(0, 1, 0.5, step=0.001, label="y: 0 top, 1 bottom", elem_id="y")
                steps = gr.Slider(1, MAX_STEPS, 3, step=1, label="Steps of 4x", elem_id="steps")
                backbone = gr.Dropdown(list(backbones), value=backbones[0], label="Backbone", elem_id="backbone")
                prompter = gr.Dropdown(list(prompters), value=prompters[0], label="Prompter", elem_id="prompter")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, elem_id="seed")
        with gr.Tab("Zoom"):
            _zoom_tab(studio, photo, request, [x, y, steps, backbone, prompter, seed])
        with gr.Tab("Whole picture"):
            _whole_tab(studio, photo, [backbone, prompter, seed])

        frames = {"inputs": [photo, x, y, steps], "outputs": preview, "show_progress": "hidden"}
        upload.upload(_guarded(studio.check), upload, photo).then(partial(_preview, studio), **frames)
        names = [sample.path for sample in samples]
        gallery.select(_choosing(names), None, photo).then(partial(_preview, studio), **frames)
        preview.select(_clicking(studio), photo, [x, y], show_progress="hidden")
        for control in (x, y, steps):
            control.change(partial(_preview, studio), **frames)
    return page


# ---------------------------------------------------------------------------------------------------------------------
# the photograph


def _guarded(function: Callable) -> Callable:
    """A user's mistake becomes a message on the page."""

    def call(*values: object) -> object:
        try:
            return function(*values)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return call


def _choosing(paths: Sequence[Path]) -> Callable:
    # Gradio finds out by a function's own annotations that it wants the event.
    def choose(event: gr.SelectData) -> Path:
        return paths[int(event.index)]

    return choose


def _preview(studio: Studio, photo: Path | None, x: float, y: float, steps: int) -> Image.Image | None:
    return None if photo is None else _guarded(studio.preview)(photo, (x, y), int(steps))


def _clicking(studio: Studio) -> Callable:
    def click(photo: Path | None, event: gr.SelectData) -> tuple[float, float]:
        if photo is None:
            raise gr.Error("choose a picture first", print_exception=False)
        width, height = studio.preview(photo).size
        return round(min(event.index[0] / width, 1), 3), round(min(event.index[1] / height, 1), 3)

    return click


def _thumbnail(path: Path) -> Image.Image:
    with Image.open(path) as file:
        file.draft("RGB", (256, 256))
        image = file.convert("RGB")
    image.thumbnail((256, 256))
    return image


# ---------------------------------------------------------------------------------------------------------------------
# zooming


def _zoom_tab(studio: Studio, photo: gr.State, request: gr.State, settings: list) -> None:
    with gr.Row():
        start = gr.Button("Zoom", variant="primary", elem_id="zoom")
        stop = gr.Button("Stop", elem_id="stop")
        film = gr.Button("Make the film", elem_id="make-film")
        pack = gr.Button("Pack the pictures", elem_id="pack")
    status = gr.Markdown(elem_id="status")
    slots, again = [], []
    for first in range(0, MAX_STEPS, 3):
        with gr.Row():
            for step in range(first + 1, first + 4):
                with gr.Column(visible=False, elem_id=f"step{step}") as column:
                    image = gr.Image(
                        label=f"Step {step}", interactive=False, format="png", elem_id=f"image{step}", buttons=_BUTTONS
                    )
                    words = gr.Textbox(label=f"Prompt of step {step}", lines=2, interactive=True, elem_id=f"prompt{step}")
                    again.append((gr.Button(f"Again from step {step} with this prompt", elem_id=f"again{step}"), words))
                slots.append((column, image, words))
    with gr.Row():
        video = gr.Video(label="Film", interactive=False, visible=False, elem_id="film", buttons=["download"])
        archive = gr.File(label="Pictures, prompts and strip", interactive=False, visible=False, elem_id="archive")
    outputs = [request, status, video, archive, *(part for slot in slots for part in slot)]
    events = [start.click(partial(_start, studio), [photo, *settings], outputs, concurrency_limit=4, concurrency_id="zoom")]
    for step, (button, words) in enumerate(again, start=1):
        handler = partial(_again, studio, step)
        events.append(button.click(handler, [request, words], outputs, concurrency_limit=4, concurrency_id="zoom"))
    stop.click(lambda: "Stopped; Zoom goes on from the finished states.", None, status, cancels=events)
    film.click(partial(_film, studio), request, video)
    pack.click(partial(_pack, studio), request, archive)


def _start(
    studio: Studio,
    photo: Path | None,
    x: float,
    y: float,
    steps: int,
    backbone: str,
    prompter: str,
    seed: int | None,
) -> Iterator[list]:
    if photo is None:
        raise gr.Error("choose a picture first", print_exception=False)
    yield from _states(studio, Request(Path(photo), (x, y), int(steps), backbone, prompter, int(seed or 0)))


def _again(studio: Studio, step: int, request: Request | None, words: str) -> Iterator[list]:
    """Go on from a step with other words: what is before it stays, what comes after is made anew."""
    kept = {} if request is None else {at: text for at, text in request.words.items() if at < step}
    yield from _states(studio, replace(_asked(request), words={**kept, step: words.strip()}))


def _states(studio: Studio, request: Request) -> Iterator[list]:
    """The page's outputs after each state."""
    shown: list = [gr.update()] * (3 * MAX_STEPS)
    for step in range(1, MAX_STEPS + 1):
        shown[3 * (step - 1)] = gr.update(visible=step <= request.steps)
    busy = f"working on step 1 of {request.steps}…"
    yield [request, busy, gr.update(visible=False), gr.update(visible=False), *shown]
    try:
        for state in studio.zoom(request):
            if state.step == 0:
                continue
            shown = [gr.update()] * (3 * MAX_STEPS)
            at = 3 * (state.step - 1)
            shown[at + 1] = gr.update(value=state.image, label=f"Step {state.step}: {state.scale:g}x")
            shown[at + 2] = gr.update(value=state.prompt)
            done = state.step == request.steps
            where = html.escape(state.describe())
            word = f"finished: {where}" if done else f"working on step {state.step + 1} of {request.steps}… ({where})"
            yield [request, word, gr.update(), gr.update(), *shown]
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _asked(request: Request | None) -> Request:
    if request is None:
        raise gr.Error("zoom into a picture first", print_exception=False)
    return request


def _film(studio: Studio, request: Request | None) -> object:
    return gr.update(value=str(_guarded(studio.film)(_asked(request))), visible=True)


def _pack(studio: Studio, request: Request | None) -> object:
    return gr.update(value=str(_guarded(studio.archive)(_asked(request))), visible=True)


# ---------------------------------------------------------------------------------------------------------------------
# whole pictures


def _whole_tab(studio: Studio, photo: gr.State, settings: list) -> None:
    with gr.Row():
        scale = gr.Radio([4, 16, 64], value=4, label="Scale", elem_id="scale")
        prompts = gr.Dropdown(
            [
                ("as the backbone needs", ""),
                ("one for all", "global"),
                ("one per tile", "tile"),
                ("one per 4 x 4 tiles", "grid"),
            ],
            value="",
            label="Prompts",
            elem_id="prompts",
        )
    with gr.Row():
        start = gr.Button("Enlarge the whole picture", variant="primary", elem_id="enlarge")
        stop = gr.Button("Stop", elem_id="stop-whole")
    status = gr.Markdown(elem_id="whole-status")
    viewer = gr.HTML(elem_id="viewer")
    tiff = gr.File(label="BigTIFF", interactive=False, visible=False, elem_id="tiff")
    inputs, outputs = [photo, scale, prompts, *settings], [status, viewer, tiff]
    event = start.click(partial(_whole, studio), inputs, outputs, concurrency_limit=2, concurrency_id="whole")
    stop.click(lambda: "Stopped; the same button goes on from the finished tiles.", None, status, cancels=[event])


def _whole(
    studio: Studio,
    photo: Path | None,
    scale: float,
    prompts: str,
    backbone: str,
    prompter: str,
    seed: int | None,
) -> Iterator[list]:
    if photo is None:
        raise gr.Error("choose a picture first", print_exception=False)
    try:
        name, enlarger = studio.enlarger(
            Path(photo),
            scale=float(scale),
            backbone=backbone,
            prompter=prompter,
            prompts=prompts or None,  # type: ignore[arg-type]
            seed=int(seed or 0),
        )
        for news in studio.enlarge(enlarger):
            if isinstance(news, Enlargement):
                yield _result(name, news)
            else:
                yield [f"{news} of {enlarger.tiles} tiles…", gr.update(), gr.update(visible=False)]
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _result(name: str, result: Enlargement) -> list:
    height, width = result.size
    frame = f'<iframe src="/coz/view/{name}" title="the enlarged picture"></iframe>'
    score, error = result.seams()
    status = f"finished: {width} x {height} px, seams {score:.3f} ± {error:.3f} (1: none)"
    if height * width > _TIFF_LIMIT_PX:
        return [f"{status}; in {result.folder / 'image.ome.zarr'}", frame, gr.update(visible=False)]
    path = result.folder / "image.tif"
    if not path.is_file():
        result.write_bigtiff(path)
    return [status, frame, gr.update(value=str(path), visible=True)]
