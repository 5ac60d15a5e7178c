from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

from russet.diagnostics import self_test as module
from russet.diagnostics.self_test import Line, check, check_network, dtypes, look, passed, self_test
from russet.diagnostics.self_test_cases import CASES, NETWORKS, OPERATIONS, Case
from russet.diagnostics.self_test_probes import PROBES
from russet.errors import DeviceError
from russet.hardware.facts import mac, read_facts
from russet.hardware.known_bugs import BY_ID
from russet.models.attention import HAS_SDPA

from ..devices.virtual_mps.machine import VirtualMac

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lines():
    return list(self_test("cpu"))


def test_the_cpu_agrees_with_itself(lines):
    assert passed(lines)
    exact = [line for line in lines if line.dtype == "float32" and not line.name.startswith("defect")]
    assert len(exact) == len(CASES) + len(NETWORKS)
    assert max(line.difference for line in exact) < 1e-5  # other memory formats add in another order


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_half_precision_stays_within_its_tolerance(case):
    # bfloat16, since CPUs of today compute it whole; float16 rounds less
    assert check(case, CPU, "bfloat16").verdict == "ok"


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.name)
def test_networks_stay_within_their_tolerance(case):
    assert check_network(case, CPU, "bfloat16", read_facts("cpu")).verdict == "ok"


@pytest.mark.cpu_half
def test_a_wrong_operation_is_found(monkeypatch):
    right = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, w: right(x, w) * (1.1 if x.dtype == torch.float16 else 1))
    line = check(Case("convolution", ((2, 8, 6, 6), (8, 8, 3, 3)), lambda x, w: F.conv2d(x, w)), CPU, "float16")
    assert (line.verdict, round(line.difference, 2)) == ("wrong", 0.1)
    assert not passed([line])


def test_nan_is_wrong_however_large_the_tolerance():
    line = check(Case("nan", ((3,),), lambda x: x / 0 * 0 if x.dtype == torch.float16 else x, 1e9), CPU, "float16")
    assert line.verdict == "wrong"


def test_an_operation_that_raises_is_reported_and_the_rest_goes_on(monkeypatch):
    def broken(x):
        if x.dtype == torch.bfloat16:
            raise NotImplementedError("no kernel\nand a long explanation")
        return x

    cases = (Case("broken", ((3,),), broken), Case("sound", ((3,),), lambda x: x + 1))
    facts = dataclasses.replace(read_facts("cpu"), bf16=True)
    monkeypatch.setattr(module, "CASES", cases)
    monkeypatch.setattr(module, "NETWORKS", ())
    monkeypatch.setattr(module, "PROBES", ())
    monkeypatch.setattr(module, "read_facts", lambda device: facts)
    found = [(line.name, line.dtype, line.verdict, line.detail) for line in self_test("cpu")]
    assert found == [
        ("broken", "float32", "ok", ""),
        ("broken", "bfloat16", "failed", "NotImplementedError: no kernel"),
        ("sound", "float32", "ok", ""),
        ("sound", "bfloat16", "ok", ""),
    ]


def test_another_shape_is_wrong():
    line = check(Case("shape", ((3,),), lambda x: x[: 2 if x.dtype == torch.float16 else 3]), CPU, "float16")
    assert (line.verdict, line.detail) == ("wrong", "shape [2] instead of [3]")


def test_known_defects_are_looked_for_and_do_not_count(lines):
    probes = {line.name: line for line in lines if line.name.startswith("defect")}
    assert set(probes) == {f"defect {probe.bug}" for probe in PROBES}
    assert {probe.bug for probe in PROBES} <= set(BY_ID)
    assert passed([dataclasses.replace(line, verdict="present") for line in probes.values()])


def test_a_defect_that_is_there_is_seen(monkeypatch):
    probe = next(probe for probe in PROBES if probe.bug == "empty-baddbmm")
    right = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda c, a, b, beta: right(c, a, b, beta=0) + 0 * c)
    line = look(probe, CPU, mac("M1", memory_gib=8, torch="2.5.1"))
    assert (line.verdict, line.expected) == ("present", True)


def test_precisions_follow_the_device():
    assert dtypes(mac("M1", memory_gib=8, torch="2.13.0")) == ["float32", "float16", "bfloat16"]
    assert dtypes(mac("M1", memory_gib=8, torch="2.2.0")) == ["float32", "float16"]


def test_a_line_reads_and_is_json(lines):
    for line in lines:
        assert line.name in str(line)
        json.dumps(line.to_dict(), allow_nan=False)
    json.dumps(Line("x", "float16", "wrong", float("inf"), 0.1).to_dict(), allow_nan=False)


def test_between_two_lines_gradients_are_as_the_caller_had_them():
    tested = self_test("cpu")
    next(tested)
    assert torch.is_grad_enabled()


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    check_network(NETWORKS[-1], CPU, "float32", read_facts("cpu"))
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize(
    ("chip", "torch_version", "macos"),
    [
        ("M1", "2.0.1", "13.3"),
        ("M1", "2.5.1", "15.0"),
        ("M1", "2.13.0", "15.0"),
        ("M1", "2.13.0", "26.1"),
        ("M5", "2.12.1", "26.1"),
    ],
)
def test_a_virtual_mac_passes_whatever_its_defects(chip, torch_version, macos, monkeypatch):
    monkeypatch.setattr(module, "CASES", OPERATIONS)
    monkeypatch.setattr(module, "dtypes", lambda facts: ["float16"])
    with VirtualMac(chip, memory_gib=8, torch=torch_version, macos=macos):
        found = list(self_test("mps"))
    assert passed(found), [str(line) for line in found if line.verdict in ("wrong", "failed")]
    present = {line.name for line in found if line.verdict == "present"}
    assert "defect empty-baddbmm" in present
    if HAS_SDPA:  # without it an older torch cannot show what a newer one's does
        assert ("defect causal-leak" in present) is (torch_version != "2.13.0")
    assert ("defect batched-linear" in present) is ((chip, macos) == ("M1", "26.1"))
    assert ("defect batched-linear-m5" in present) is (chip == "M5")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has mps")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(DeviceError):
        next(self_test("mps"))
