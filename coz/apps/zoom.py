"""Zoom into a photograph: `python -m coz.apps.zoom image=photo.jpg scale=64 at=0.31,0.62`. `--cfg job` lists the settings."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see evaluate.py

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from coz import cli
from coz.apps.arguments import friendly
from coz.errors import UserError
from coz.image import read_photo
from coz.parts import parts_of
from coz.store import StateStore
from coz.zoom_files import save_state, save_zoom
from coz.zooming import MIN_SIDE_PX, Zoom, Zoomer, check_words, plan_route, step_settings


def main(_: DictConfig) -> None:
    """States one by one, then the strip and the film."""
    config, folder = cli.resolve("zoom"), Path(HydraConfig.get().runtime.output_dir)
    zoomer, about = prepare(config)
    cli.record_provenance(folder, config)
    states = []
    with tqdm(total=len(zoomer.route.factors), desc="zoom", unit="state", disable=None) as bar:
        for state in zoomer:
            states.append(state)
            tqdm.write(f"{state.describe()}  -> {save_state(state, folder)}")
            bar.update(min(state.step, 1))
    zoom = Zoom(tuple(states), zoomer.photo, about)
    save_zoom(zoom, folder, film=config.film, fps=config.film_fps, seconds_per_step=config.film_seconds)
    print(f"strip -> {folder / 'strip.png'}" + (f"\nfilm -> {folder / 'film.mp4'}" if config.film else ""))


def prepare(config: DictConfig) -> tuple[Zoomer, dict[str, object]]:
    """Everything a zoom needs, checked before any weights load.

    Raises:
        UserError: a mistake in the settings, or weights that are not here.
    """
    if config.image is None:
        raise UserError("no image is given; say which, as in `python -m coz.apps.zoom image=photo.jpg scale=64 at=0.31,0.62`")
    photo = read_photo(str(config.image), min_side_px=MIN_SIDE_PX)
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    names = ("scale", "at", "path", "region", "aspect", "state_px", "max_factor")
    route = plan_route(photo.size, **{name: plain[name] for name in names})  # type: ignore[arg-type]
    words = check_words(plain["prompts"] or {}, len(route.factors))  # type: ignore[arg-type]
    if config.film:
        from coz.film import check_film

        check_film(fps=config.film_fps, seconds_per_step=config.film_seconds)
    backbone, prompter = parts_of(config)
    settings = step_settings(backbone, prompter, rounding=config.rounding, first_pair=config.first_pair, seed=config.seed)
    store = StateStore(Path(config.outputs) / "zoom" / "states")
    about = {"backbone": dict(backbone.fingerprint), "prompter": dict(prompter.fingerprint), "seed": config.seed}
    return Zoomer(photo, route, settings, config.seed, words, store), about


if __name__ == "__main__":
    sys.argv[1:] = friendly(sys.argv[1:])
    cli.run(main, config_name="zoom")
