"""What the web page does, without the page: uploads checked, zooms and enlargements run, one at a time per machine."""

from __future__ import annotations

import hashlib
import logging
import queue
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, UnidentifiedImageError

from coz.backbones.base import Backbone
from coz.chain import StepSettings, plan_factors
from coz.enlarging import Enlargement, Enlarger, EnlargeSettings, prompt_mode
from coz.errors import UserError
from coz.film import write_film
from coz.image import read_photo
from coz.parts import build_parts
from coz.prompters.base import Prompter
from coz.store import StateStore, fingerprint
from coz.tile_prompts import PromptMode
from coz.zoom_files import save_zoom
from coz.zooming import Route, Zoom, Zoomer, ZoomState, plan_route

logger = logging.getLogger(__name__)

MAX_STEPS = 6
PREVIEW_PX = 1024
_RUN_ID = re.compile(r"[0-9a-f]{20}")
_COLORS = ("#e4572e", "#f3a712", "#29a19c", "#4361ee", "#9b5de5", "#e4572e")


@dataclass(frozen=True)
class Limits:
    """What the page takes in and gives out."""

    photo_px: int
    result_px: int


@dataclass(frozen=True)
class Request:
    """One zoom that somebody asked for; the same request again finds its states in the store."""

    photo: Path
    at: tuple[float, float]
    steps: int
    backbone: str
    prompter: str
    seed: int
    words: dict[int, str] = field(default_factory=dict)


class Studio:
    """Everything behind the page. Thread-safe: Gradio calls it from many."""

    def __init__(
        self,
        *,
        outputs: Path,
        limits: Limits,
        own: dict[str, Backbone | Prompter],
        profile: str,
        state_px: int,
        device: str,
        precision: str,
    ) -> None:
        """
        Args:
            outputs: the page's folder.
            own: parts that the configuration built, by name; others are built when first chosen.
            profile, device, precision: for those others.
        """
        self._outputs, self._limits, self._own = outputs, limits, own
        self._profile, self._state_px, self._device, self._precision = profile, state_px, device, precision
        self._store = StateStore(outputs / "states")
        self._turn = threading.Lock()  # one computation at a time: two would only share the same cores

    # -----------------------------------------------------------------------------------------------------------------
    # photographs

    def check(self, path: str | Path) -> Path:
        """A photograph that somebody dropped, checked by its header before it is decoded.

        Raises:
            UserError: no image, damaged, too small or too large.
        """
        path = Path(path)
        limit = self._limits.photo_px
        try:
            with Image.open(path) as file:
                width, height = file.size
        except Image.DecompressionBombError as error:
            raise UserError(f"{path.name} has more pixels than the {limit / 1e6:g} megapixels taken here; reduce it") from error
        except UnidentifiedImageError:
            width, height = 0, 0  # `read_photo` knows some TIFFs more, and says what is wrong with the rest
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path.name} cannot be read ({error}); choose another picture") from error
        if width * height > limit:
            raise UserError(
                f"{path.name} has {width} x {height} px, more than the {limit / 1e6:g} megapixels taken here; reduce it first"
            )
        try:
            read_photo(path, min_side_px=32)
        except UserError as error:
            raise UserError(str(error).replace(str(path), path.name)) from error
        return path

    def preview(self, path: Path, at: tuple[float, float] | None = None, steps: int = 3) -> Image.Image:
        """The photograph at a size for the page, with a frame around each step that is to come."""
        image = read_photo(path)
        size = image.size
        image.thumbnail((PREVIEW_PX, PREVIEW_PX), Image.Resampling.LANCZOS)
        if at is not None:
            draw = ImageDraw.Draw(image)
            for index, rect in enumerate(self._route(size, at, steps).targets):
                x, y = rect.left * image.width, rect.top * image.height
                edges = (x, y, max(x + rect.width * image.width, x + 3), max(y + rect.height * image.height, y + 3))
                draw.rectangle(edges, outline=_COLORS[index], width=3)
        return image

    def _route(self, size: tuple[int, int], at: tuple[float, float], steps: int) -> Route:
        return plan_route(size, scale=4**steps, at=at, state_px=self._state_px)

    # -----------------------------------------------------------------------------------------------------------------
    # zooms

    def zoom(self, request: Request) -> Iterator[ZoomState]:
        """The states one by one; those that are in the store at once."""
        zoomer = self._zoomer(request)
        states = iter(zoomer)
        while True:
            with self._turn:
                state = next(states, None)
            if state is None:
                return
            yield state

    def finished(self, request: Request) -> Zoom:
        """A zoom whose states are in the store."""
        zoomer = self._zoomer(request)
        with self._turn:
            return Zoom(tuple(zoomer), zoomer.photo, {"seed": request.seed, "backbone": request.backbone})

    def film(self, request: Request) -> Path:
        """The film of a zoom, an mp4."""
        zoom = self.finished(request)
        path = self._outputs / "films" / f"{zoom.states[-1].key}.mp4"
        if not path.is_file():
            with self._turn:
                write_film(path, zoom.states)
        return path

    def archive(self, request: Request) -> Path:
        """A zip of the states, the prompts and the strip."""
        zoom = self.finished(request)
        folder = self._outputs / "zips" / zoom.states[-1].key
        save_zoom(zoom, folder, film=False, fps=30, seconds_per_step=2.5)
        return Path(shutil.make_archive(str(folder), "zip", folder))

    def _zoomer(self, request: Request) -> Zoomer:
        photo = read_photo(request.photo)
        route = self._route(photo.size, request.at, request.steps)
        backbone, prompter = self._parts(request.backbone, request.prompter)
        settings = StepSettings(backbone, prompter, "round", "released")
        words = {step: text for step, text in request.words.items() if step <= request.steps}
        return Zoomer(photo, route, settings, request.seed, words, self._store)

    def _parts(self, backbone: str, prompter: str) -> tuple[Backbone, Prompter]:
        return build_parts(
            backbone=self._own.get(f"backbone={backbone}", backbone),  # type: ignore[arg-type]
            prompter=self._own.get(f"prompter={prompter}", prompter),  # type: ignore[arg-type]
            profile=self._profile,
            device=self._device,
            precision=self._precision,
        )

    # -----------------------------------------------------------------------------------------------------------------
    # whole photographs

    def enlarger(
        self, photo: Path, *, scale: float, backbone: str, prompter: str, prompts: PromptMode | None, seed: int
    ) -> tuple[str, Enlarger]:
        """An enlargement's name and its maker, checked.

        Raises:
            UserError: the result would be larger than the page gives out.
        """
        image = read_photo(photo)
        parts = self._parts(backbone, prompter)
        pixels = image.width * image.height * scale**2
        if pixels > self._limits.result_px:
            raise UserError(
                f"{scale:g}x of {image.width} x {image.height} px are {pixels / 1e6:,.0f} megapixels, more than the "
                f"{self._limits.result_px / 1e6:,.0f} made here; lower the scale, or use `python -m coz.apps.enlarge`"
            )
        settings = EnlargeSettings(*parts, prompt_mode(prompts, parts[0]), seed=seed)
        about: dict[str, object] = {"photo": hashlib.sha256(image.tobytes()).hexdigest(), "size": list(image.size)}
        about |= {"scale": scale, "backbone": dict(parts[0].fingerprint), "prompter": dict(parts[1].fingerprint)}
        run_id = fingerprint({**about, "prompts": settings.prompts, "seed": seed})
        return run_id, Enlarger(image, self._outputs / "enlarged" / run_id, factors=plan_factors(scale), settings=settings)

    def enlarge(self, enlarger: Enlarger) -> Iterator[int | Enlargement]:
        """The number of finished tiles, every now and then, and at last the result. Closing the iterator stops the work."""
        news: queue.Queue[int | Enlargement | BaseException] = queue.Queue()
        stop = threading.Event()
        count = enlarger.finished_tiles()

        def on_tile(step: int, tile: object) -> None:
            nonlocal count
            if stop.is_set():
                raise _Stopped
            count += 1
            news.put(count)
            self._turn.release()  # somebody else's zoom need not wait for the whole picture
            time.sleep(0.001)
            self._turn.acquire()

        def work() -> None:
            try:
                with self._turn:
                    news.put(enlarger.run(on_tile))
            except BaseException as error:  # noqa: BLE001 - handed to the page's thread, which raises it
                news.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield count
            while True:
                item = news.get()
                while isinstance(item, int) and not news.empty():
                    item = news.get()  # the page need not hear of every tile
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, Enlargement):
                    return
        finally:
            stop.set()

    def enlarged(self, run_id: str) -> Path | None:
        """The pyramid of a finished enlargement by its name, or None."""
        if not _RUN_ID.fullmatch(run_id):
            return None
        group = self._outputs / "enlarged" / run_id / "image.ome.zarr"
        return group if (group / "zarr.json").is_file() else None


class _Stopped(Exception):
    """Somebody stopped an enlargement."""
