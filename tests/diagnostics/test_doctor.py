from __future__ import annotations

import dataclasses
import json

import pytest

from russet.diagnostics.checks import all_checks
from russet.diagnostics.doctor import MODELS, doctor, forecast
from russet.hardware.facts import GIB, Facts, mac, read_facts
from russet.hardware.host_environment import HostEnvironment, read_host_environment
from russet.pipelines.registry import PIPELINES
from russet.planning import reference_models

GOOD = HostEnvironment(cache="/cache", disk_free=100 * GIB, logged_in=True, variables={})
MAC = mac("M2 Pro", memory_gib=32, macos="15.1", torch="2.13.0")


def check(name, facts=MAC, around=GOOD):
    return {each.name: each for each in all_checks(facts, around)}[name]


def test_a_good_mac_has_no_complaints():
    report = doctor(MAC, GOOD)
    assert report.verdict == "ok"
    assert all(each.status == "ok" and not each.advice for each in report.checks)


@pytest.mark.parametrize(
    ("name", "facts", "status", "advice"),
    [
        ("macOS", {"macos": (13, 6)}, "problem", "needs macOS 14"),
        ("macOS", {"macos": (12, 6), "torch": (2, 3, 0)}, "warning", "upsampling"),
        ("macOS", {"macos": (13, 2, 1), "torch": (2, 3, 0)}, "warning", "linear layers"),
        ("macOS", {"macos": (27, 0), "torch": (2, 12, 0)}, "warning", "update torch"),
        ("mps", {"mps_available": False, "mps_built": False}, "problem", "built without mps"),
        ("mps", {"mps_available": False}, "problem", "too old"),
        ("Python", {"rosetta": True, "machine": "x86_64"}, "problem", "arm64 Python"),
        ("Python", {"python": (3, 9, 1)}, "problem", "need 3.10"),
        ("Python", {"python": (3, 10, 1), "torch": (2, 15, 0)}, "problem", "need 3.11"),
        ("PyTorch", {"torch": (1, 12, 1)}, "problem", "needs 1.13"),
        ("PyTorch", {"torch": (2, 12, 1)}, "warning", "2.13 has fast attention"),
        ("memory", {"memory": 4 * GIB}, "warning", "8 GB is the least"),
        ("memory available", {"available": GIB}, "warning", "close other programs"),
        ("swap", {"swap_used": 3 * GIB}, "warning", "memory is short"),
        ("device", {"device": "cpu"}, "warning", "no GPU is used"),
    ],
)
def test_every_requirement_says_what_to_do(name, facts, status, advice):
    found = check(name, dataclasses.replace(MAC, **facts))
    assert found.status == status
    assert advice in found.advice


@pytest.mark.parametrize(
    ("name", "around", "status", "advice"),
    [
        ("disk", {"disk_free": 10**9}, "problem", "HF_HOME"),
        ("disk", {"disk_free": 9 * 10**9}, "warning", "small model"),
        ("Hugging Face Hub", {"logged_in": False}, "ok", "hf auth login"),
        ("PYTORCH_ENABLE_MPS_FALLBACK", {"variables": {"PYTORCH_ENABLE_MPS_FALLBACK": "1"}}, "warning", "CPU"),
        (
            "PYTORCH_MPS_HIGH_WATERMARK_RATIO",
            {"variables": {"PYTORCH_MPS_HIGH_WATERMARK_RATIO": "0.0"}},
            "warning",
            "no limit",
        ),
    ],
)
def test_the_surroundings_are_checked_too(name, around, status, advice):
    found = check(name, around=dataclasses.replace(GOOD, **around))
    assert found.status == status
    assert advice in found.advice


def test_variables_that_do_no_harm_are_not_mentioned():
    around = dataclasses.replace(GOOD, variables={"PYTORCH_MPS_HIGH_WATERMARK_RATIO": "1.0"})
    assert not [each for each in all_checks(MAC, around) if each.name.startswith("PYTORCH")]


def test_the_worst_line_is_the_verdict():
    assert doctor(dataclasses.replace(MAC, swap_used=9 * GIB), GOOD).verdict == "warning"
    assert doctor(dataclasses.replace(MAC, swap_used=9 * GIB, macos=(12, 0)), GOOD).verdict == "problem"


def test_a_linux_machine_is_not_asked_for_macos():
    facts = Facts(device="cuda", chip="GPU", memory=24 * GIB, available=20 * GIB, torch=(2, 13), system="Linux")
    names = [each.name for each in all_checks(dataclasses.replace(facts, python=(3, 11)), GOOD)]
    assert "macOS" not in names
    assert "mps" not in names


def test_the_two_models_are_planned_or_refused_with_the_reason():
    small = doctor(mac("M1", memory_gib=8), GOOD).forecasts[0]
    large = forecast(mac("M1", memory_gib=8), "XL", reference_models.sdxl())
    assert small.title.startswith("Stable Diffusion 1.5")
    assert small.plan.peak < small.plan.facts.budget
    assert large.plan.offload == "model"
    assert "close other programs" in large.plan.explain()
    assert "need at least" in forecast(mac("M1", memory_gib=6), "XL", reference_models.sdxl()).refusal


def test_only_models_that_russet_has_a_pipeline_for_are_planned():
    planned = {each.title for each in doctor(MAC, GOOD).forecasts}
    assert planned == {title for title, (name, _) in MODELS.items() if name in PIPELINES}


def test_known_defects_of_the_machine_are_listed():
    found = {bug.id for bug in doctor(mac("M1", memory_gib=16, torch="2.5.1"), GOOD).bugs}
    assert {"no-flash", "slow-group-norm", "long-contraction"} <= found


def test_a_report_is_json():
    written = json.loads(json.dumps(doctor(mac("M1", memory_gib=7, torch="2.5.1"), GOOD).to_dict()))
    assert written["facts"]["torch"] == "2.5.1"
    assert written["facts"]["macos"] == "15.0"
    decisions = written["forecasts"][0]["plan"]["decisions"]
    assert decisions["dtype.unet"]["value"] == "float16"
    assert decisions["attention.unet"]["reason"]
    small = doctor(mac("M1", memory_gib=2), GOOD).to_dict()
    assert json.loads(json.dumps(small))["forecasts"][0]["plan"] is None


def test_this_machine_can_be_judged():
    report = doctor(read_facts("cpu"), dataclasses.replace(read_host_environment(), logged_in=False))
    assert report.checks
    assert report.host.disk_free > 0
    json.dumps(report.to_dict())


def test_the_disk_of_a_cache_that_does_not_exist_yet_is_found(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    assert read_host_environment().disk_free > 0
