"""Enlarge a whole photograph: `python -m coz.apps.enlarge image=photo.jpg scale=64`. `--cfg job` lists the settings."""

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
from coz.chain import plan_factors
from coz.enlarging import Enlarger, EnlargeSettings, prompt_mode, shrink
from coz.errors import UserError
from coz.image import read_photo
from coz.parts import parts_of
from coz.store import fingerprint


def main(_: DictConfig) -> None:
    """Tile after tile into a pyramid; then the seam score and, if wanted, a BigTIFF."""
    config = cli.resolve("enlarge")
    enlarger = prepare(config)
    cli.record_provenance(Path(HydraConfig.get().runtime.output_dir), config)
    height, width = enlarger.plans[-1].target_size
    finished = enlarger.finished_tiles()
    print(f"{width} x {height} px, {finished} of {enlarger.tiles} tiles are there -> {enlarger.folder}")
    with tqdm(total=enlarger.tiles, initial=finished, desc="enlarge", unit="tile", disable=None) as bar:
        result = enlarger.run(lambda step, tile: bar.update())
    score, error = result.seams()
    print(f"seams {score:.3f} ± {error:.3f} (1: none) -> {result.folder / 'image.ome.zarr'}")
    if config.tiff:
        print(f"tiff -> {result.write_bigtiff(result.folder / 'image.tif')}")


def prepare(config: DictConfig) -> Enlarger:
    """Everything an enlargement needs, checked before any weights load.

    Raises:
        UserError: a mistake in the settings, or weights that are not here.
    """
    if config.image is None:
        raise UserError("no image is given; say which, as in `python -m coz.apps.enlarge image=photo.jpg scale=16`")
    if config.start_px is not None and (not isinstance(config.start_px, int) or config.start_px < 16):
        raise UserError(f"start_px={config.start_px} must be null or a whole number of at least 16")
    photo = shrink(read_photo(str(config.image), min_side_px=8), config.start_px)
    factors = plan_factors(config.scale, config.max_factor)
    backbone, prompter = parts_of(config)
    settings = EnlargeSettings(
        backbone=backbone,
        prompter=prompter,
        prompts=prompt_mode(config.prompts, backbone),
        grid=config.grid,
        tile_px=config.tile_px,
        overlap_px=config.overlap_px,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    folder = config.folder
    if folder is None:
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        without = {str(key): value for key, value in plain.items() if key not in ("tiff", "outputs", "batch_size", "folder")}
        stem = Path(str(config.image)).stem
        folder = Path(config.outputs) / "enlarge" / f"{stem}_{config.scale:g}x_{fingerprint(without)[:8]}"
    return Enlarger(photo, Path(folder), factors=factors, settings=settings)


if __name__ == "__main__":
    sys.argv[1:] = friendly(sys.argv[1:])
    cli.run(main, config_name="enlarge")
