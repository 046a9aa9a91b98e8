"""Ask a prompter about every photograph of a training once.

`python -m coz.apps.cache_prompts prompter=tags data.paths=[/photos]`
"""

from __future__ import annotations

from omegaconf import DictConfig
from tqdm import tqdm

from coz import cli
from coz.training import prompt_cache


def main(_: DictConfig) -> None:
    config = cli.resolve("cache_prompts")
    work = prompt_cache.open_cache(
        manifest=cli.build(config.data), prompter=cli.build(config.prompter), path=config.path, crop_px=config.crop_px
    )
    for _ in tqdm(work, total=len(work), unit="photo"):
        pass
    print(
        f"{work.written} prompts written to {config.path}, {work.known} were there, {len(work.failed)} photographs unreadable"
    )


if __name__ == "__main__":
    cli.run(main, config_name="cache_prompts")
