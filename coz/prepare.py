"""Fetch the weights that a configuration needs, before a job starts: `python -m coz.prepare method=coz_vlm`; or prepare a data
set: `python -m coz.prepare dataset=div2k` unpacks its archives, checks it and writes a manifest with checksums.

Says what is there already and what is missing; downloads resume. Files that are on no hub (the authors' own links) are named
with the setting that takes their path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from omegaconf import DictConfig, OmegaConf

from coz import cli
from coz.checkpoint import WeightsNotFound, split_repository
from coz.data import datasets
from coz.errors import UserError

GROUPS = ("backbone", "prompter", "critic", "metrics")
COMPLETE = ".coz-complete"  # in a snapshot that was fetched to its end
UNUSED = ("*.msgpack", "*.h5", "*.onnx", "*.gguf", "*.mp4", "*.png", "*.jpg", "*.ipynb")
FILE_SUFFIXES = (".pth", ".pt", ".pkl", ".ckpt", ".safetensors", ".txt")


@dataclass(frozen=True)
class Need:
    """Something that a setting names: a hub repository, or a file or folder of this machine."""

    setting: str
    source: str

    @property
    def is_file(self) -> bool:
        return self.source.endswith(FILE_SUFFIXES) or self.source.startswith(("/", ".", "~")) or "/" not in self.source


def needs_of(config: DictConfig, groups: Sequence[str] = GROUPS) -> Iterator[Need]:
    """What the parts of a configuration name as weights, adapters and checkpoints."""
    for group in groups:
        node = config.get(group)
        if node is not None:
            yield from _walk(node, group)


def _walk(node: Mapping[Any, Any], path: str) -> Iterator[Need]:
    for key in node:
        value, name = node[key], f"{path}.{key}"
        if OmegaConf.is_dict(value):
            yield from _walk(value, name)
        elif (
            key
            in (
                "weights",
                "lora",
                "vae_encoder",
                "checkpoint",
                "degradation_checkpoint",
                "adapter",
                "tag_list",
                "thresholds",
            )
            and isinstance(value, str)
            and value
            and value != "random"
            and not value.startswith("package:")
        ):
            yield Need(name, value)


def state_of(need: Need) -> tuple[str, str]:
    """("have" | "unchecked" | "MISSING", where). A repository that this command did not fetch to its end is unchecked."""
    path = Path(need.source).expanduser()
    if path.exists():
        return "have", str(path)
    if need.is_file:
        return "MISSING", ""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, revision, kind = split_repository(need.source)
    try:
        folder = snapshot_download(repository, revision=revision, repo_type=kind, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        return "MISSING", ""
    return ("have" if (Path(folder) / COMPLETE).exists() else "unchecked"), folder


def fetch(need: Need) -> str:
    """Download a repository into the hub's cache, going on where an earlier call stopped; its folder.

    Raises:
        WeightsNotFound: unreachable, gated, or no such repository.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    repository, revision, kind = split_repository(need.source)
    try:
        folder = snapshot_download(repository, revision=revision, repo_type=kind, ignore_patterns=list(UNUSED))
    except GatedRepoError as error:
        raise WeightsNotFound(
            f"{repository} is gated: accept its licence on the hub, run `hf auth login`, then this again"
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsNotFound(
            f"{repository} is not on the hub, or private; check {need.setting}, or run `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise WeightsNotFound(f"{need.setting}={need.source} is neither a file here nor a hub id; check the path") from error
    except (HfHubHTTPError, OSError, httpx.HTTPError) as error:
        reason = f"the hub cannot be reached for {repository} ({type(error).__name__})"
        raise WeightsNotFound(f"{reason}; run this where it can be, and copy the cache ($HF_HOME) here") from error
    (Path(folder) / COMPLETE).touch()
    return folder


def _say(line: str) -> None:
    print(line, flush=True)


def main(_: DictConfig) -> None:
    """A data set prepared; or a report on weights, and what is missing fetched unless `list=true`."""
    config = cli.resolve("prepare")
    if config.dataset.get("count"):  # a published data set, not a folder of anybody's
        settings = OmegaConf.to_container(config.dataset, resolve=True)
        datasets.prepare(**{str(key): value for key, value in settings.items() if key != "_target_"}, say=_say)  # type: ignore[union-attr,arg-type]
        return
    needs = [Need("weights", str(config.weights))] if config.weights else list(dict.fromkeys(needs_of(config)))
    unfetched = []
    for need in needs:
        state, where = state_of(need)
        print(f"{state:9} {need.setting}={need.source}" + (f"  ({where})" if where else ""), flush=True)
        if need.is_file and state == "MISSING":
            unfetched.append(need)
        elif state != "have" and not config.list:
            print(f"fetching  {need.source}", flush=True)
            print(f"have      {need.source}  ({fetch(need)})", flush=True)
    if not needs:
        print("this configuration needs nothing that must be fetched")
    if unfetched:
        names = ", ".join(f"{need.setting}={need.source}" for need in unfetched)
        raise UserError(f"on no hub, to be fetched by hand (the comments in conf/ say where): {names}")


if __name__ == "__main__":
    cli.run(main, config_name="prepare")
