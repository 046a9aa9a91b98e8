"""The deep-zoom viewer: OpenSeadragon on this server's own tiles."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import FileResponse, HTMLResponse
from PIL import Image

from coz.pyramid import Pyramid
from coz.tiling import Box

TILE_PX = 256
STATIC = Path(__file__).parent / "static"

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>coz: {width} x {height} px</title>
<style>
html, body, #viewer {{ margin: 0; height: 100%; background: #111; }}
nav {{ position: fixed; top: 8px; left: 8px; z-index: 10; display: flex; gap: 4px; }}
button {{ font: 16px system-ui; min-width: 36px; height: 36px; border: 0; border-radius: 6px; background: #fffc; }}
button:focus-visible {{ outline: 3px solid #e4572e; }}
</style>
<nav aria-label="view"><button id="in" aria-label="zoom in">+</button><button id="out" aria-label="zoom out">-</button>
<button id="home" aria-label="whole picture">whole</button></nav>
<div id="viewer" role="application" aria-label="picture; arrow keys move, plus and minus zoom"></div>
<script src="/coz/static/openseadragon.min.js"></script>
<script>
const viewer = OpenSeadragon({{
  id: "viewer", showNavigationControl: false, showNavigator: true, maxZoomPixelRatio: 4,
  tileSources: {{ width: {width}, height: {height}, tileSize: {tile}, minLevel: {minimum}, maxLevel: {maximum},
    getTileUrl: (level, x, y) => `/coz/tiles/{name}/${{{maximum} - level}}/${{x}}_${{y}}.jpg` }}
}});
const by = f => () => {{ viewer.viewport.zoomBy(f); viewer.viewport.applyConstraints(); }};
document.getElementById("in").onclick = by(2);
document.getElementById("out").onclick = by(0.5);
document.getElementById("home").onclick = () => viewer.viewport.goHome();
window.viewer = viewer;
</script></html>
"""


def add_viewer(app: FastAPI, find: Callable[[str], Path | None]) -> None:
    """Add the viewer's page, script and tiles to a server.

    Args:
        find: a finished picture's folder by its name, or None.
    """

    def pyramid(name: str) -> Pyramid:
        group = find(name)
        if group is None:
            raise HTTPException(404, "no such picture")
        return _open(group)

    @app.get("/coz/static/openseadragon.min.js")
    def script() -> FileResponse:
        return FileResponse(STATIC / "openseadragon.min.js", media_type="text/javascript")

    @app.get("/coz/view/{name}", response_class=HTMLResponse)
    def page(name: str) -> str:
        height, width = pyramid(name).size
        # OpenSeadragon's level l is 2^(l - maximum) of the full size; ours count down from the full size.
        maximum = max(height, width, 2) - 1
        levels = len(pyramid(name).levels)
        top = maximum.bit_length()
        return _PAGE.format(width=width, height=height, tile=TILE_PX, minimum=top - levels + 1, maximum=top, name=name)

    @app.get("/coz/tiles/{name}/{level}/{x}_{y}.jpg")
    def tile(name: str, level: int, x: int, y: int) -> Response:
        picture = pyramid(name)
        if not (0 <= level < len(picture.levels) and x >= 0 and y >= 0):
            raise HTTPException(404, "no such tile")
        pixels = picture.read(level, Box(y * TILE_PX, x * TILE_PX, TILE_PX, TILE_PX))
        if pixels.size == 0:
            raise HTTPException(404, "no such tile")
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        return Response(buffer.getvalue(), media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})


@functools.lru_cache(maxsize=8)
def _open(group: Path) -> Pyramid:
    return Pyramid(group)


class LocalOnly:
    """ASGI middleware: a policy under which the browser fetches nothing from elsewhere, whatever a page asks for."""

    POLICY = (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; "
        "worker-src 'self' blob:; frame-src 'self'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
    )

    def __init__(self, app: Callable) -> None:
        self._app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"content-security-policy", self.POLICY.encode())]
                headers += [(b"referrer-policy", b"no-referrer"), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, with_policy if scope["type"] == "http" else send)
