"""The doctor says of a machine what would run there."""

from __future__ import annotations

import dataclasses
import json

import pytest

from coz import doctor
from coz.doctor import Experiment, examine, experiments, next_command
from coz.machine import Gpu, Machine

CPU = Machine("Linux", "3.11.7", 2, 8.0, 6.0, False, (), {"outputs": 100.0}, {"torch": "2.9"})
BIG = dataclasses.replace(CPU, gpus=(Gpu("H100", 80.0, 79.0, True),), memory_gb=128.0)
SMALL = dataclasses.replace(CPU, gpus=(Gpu("4080", 15.6, 15.0, True),), memory_gb=64.0)


@pytest.fixture
def everything_there(monkeypatch):
    monkeypatch.setattr(doctor, "_state", lambda need: ("have", "/somewhere"))


@pytest.fixture
def nothing_there(monkeypatch):
    monkeypatch.setattr(doctor, "_state", lambda need: ("MISSING", ""))


def chosen(profile, *titles):
    return [e for e in experiments() if e.profile == profile and (not titles or e.title in titles)]


def test_a_small_machine_runs_the_small_profiles(nothing_there):
    findings = examine(
        [*chosen("embedded", "evaluate coz_null", "evaluate coz_vlm"), *chosen("paper", "evaluate coz_vlm")], CPU
    )
    null, vlm, paper = findings
    assert null.verdict == "ready"
    assert (vlm.verdict, vlm.command) == ("no", "")
    assert "vision-language" in vlm.reason
    assert paper.verdict == "no"
    assert "8 GB" in paper.reason
    assert next_command(findings) == "python evaluate.py profile=embedded method=coz_null scale=16"


def test_missing_weights_come_with_the_command_that_fetches_them(nothing_there):
    (finding,) = examine(chosen("paper", "evaluate coz_vlm"), BIG)
    assert finding.verdict == "fetch"
    assert finding.command == "python -m coz.prepare method=coz_vlm"
    assert "Qwen/Qwen2.5-VL-3B-Instruct" in finding.reason
    assert next_command([finding]) == finding.command


def test_with_the_weights_a_big_gpu_runs_the_paper(everything_there):
    findings = examine(chosen("paper", "evaluate nn", "evaluate coz_vlm", "tune the prompts"), BIG)
    nn, vlm, grpo = findings
    assert [nn.verdict, vlm.verdict] == ["ready", "ready"]
    assert next_command(findings) == vlm.command
    assert grpo.verdict == "no"  # the photographs are not here
    assert "/data/LSDIR" in grpo.reason


def test_a_middling_gpu_is_told_the_settings_that_fit(everything_there):
    (finding,) = examine(chosen("paper", "evaluate coz_vlm"), SMALL)
    assert finding.verdict == "ready"
    assert finding.command.endswith("memory=16gb")


def test_what_trains_the_papers_models_needs_a_gpu(everything_there):
    for finding in examine(chosen("paper", "train the backbone", "tune the prompts"), CPU):
        assert finding.verdict == "no"
        assert "no GPU is here" in finding.reason


def test_a_package_that_is_not_installed_is_named(everything_there):
    wanted = Experiment("embedded", "the web page", "demo", (), "run", packages=("surely_not_installed",))
    (finding,) = examine([wanted], BIG)
    assert finding.verdict == "no"
    assert "surely_not_installed" in finding.reason


def test_every_experiments_command_is_its_configuration():
    for experiment in experiments():
        assert all(override in experiment.command for override in experiment.overrides)


def test_the_command_for_people_and_for_programs(capsys, nothing_there, monkeypatch, tmp_path):
    few = chosen("embedded", "evaluate coz_null")
    monkeypatch.setattr(doctor, "experiments", lambda: few)
    assert doctor.main(["--outputs", str(tmp_path / "not" / "there")]) == 0
    said = capsys.readouterr().out
    assert "to type next:  python evaluate.py profile=embedded" in said
    assert "cores" in said
    assert not list(tmp_path.iterdir())
    assert doctor.main(["--json", "--outputs", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["experiments"][0]["verdict"] == "ready"
    assert told["machine"]["memory_gb"] > 0
