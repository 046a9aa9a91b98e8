"""The web page: `python -m coz.apps.demo`, then http://127.0.0.1:7860. `--cfg job` lists the settings."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see evaluate.py
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from coz import cli
from coz.apps.arguments import friendly
from coz.data.photos import list_photos
from coz.errors import UserError
from coz.parts import parts_of

if TYPE_CHECKING:
    from fastapi import FastAPI

    from coz.backbones.base import Backbone
    from coz.prompters.base import Prompter

_EMBEDDED = {"backbone": ("realesrgan", "span", "bicubic"), "prompter": ("tags", "null")}


def main(_: DictConfig) -> None:
    """Check everything, build the page, serve it until somebody stops it."""
    config = cli.resolve("demo")
    check_server(config)
    app = build_app(config)
    cli.record_provenance(Path(HydraConfig.get().runtime.output_dir), config)
    import uvicorn

    host = str(config.host)
    print(f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{config.port}  (Ctrl-C stops it)", flush=True)
    uvicorn.run(app, host=host, port=int(config.port), log_level="warning")


def check_server(config: DictConfig) -> None:
    """Refuse a port that cannot be had, and a machine without Gradio.

    Raises:
        UserError: says which.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError("the page needs Gradio; install it with `pip install gradio`") from error
    if not isinstance(config.port, int) or not 0 < config.port < 65536:
        raise UserError(f"port={config.port} is no port; use a number from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((str(config.host), config.port))
        except OSError as error:
            raise UserError(f"{config.host}:{config.port} cannot be had ({error.strerror}); choose another port") from error


def build_app(config: DictConfig) -> FastAPI:
    """The server: Gradio's page, the viewer, and the policy that keeps both on this machine.

    Raises:
        UserError: parts that are not on this machine, no samples.
    """
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from coz.apps.page import CSS, THEME, build_page
    from coz.apps.studio import Limits, Studio
    from coz.apps.viewer import LocalOnly, add_viewer

    own: dict[str, Backbone | Prompter] = dict(zip(("backbone", "prompter"), parts_of(config), strict=True))
    names = {group: list(dict.fromkeys([str(config.choices[group]), *_EMBEDDED[group]])) for group in own}
    outputs = Path(config.outputs).resolve() / "demo"
    studio = Studio(
        outputs=outputs,
        limits=Limits(int(config.max_photo_megapixels * 1e6), int(config.max_result_megapixels * 1e6)),
        own={f"{group}={config.choices[group]}": part for group, part in own.items()},
        profile=str(config.profile.name),
        state_px=int(config.state_px),
        device=str(config.device),
        precision=str(config.precision),
    )
    samples = list_photos(path=str(config.samples))
    page = build_page(studio, samples=samples, backbones=names["backbone"], prompters=names["prompter"])
    page.queue(max_size=64)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_viewer(app, studio.enlarged)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        allowed_paths=[str(outputs)],
        max_file_size=f"{config.max_upload_mb}mb",
        show_error=True,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        theme=THEME,
        css=CSS,
    )
    app.add_middleware(LocalOnly)
    if str(config.host) in ("127.0.0.1", "localhost", "::1"):
        # Another site's script must not reach this page under a name of its own (DNS rebinding).
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    return app


if __name__ == "__main__":
    sys.argv[1:] = friendly(sys.argv[1:], files=("samples",), lists=())
    cli.run(main, config_name="demo")
