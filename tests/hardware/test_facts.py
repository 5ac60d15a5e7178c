from __future__ import annotations

import dataclasses
import sys

import psutil
import pytest
import torch

from russet.errors import DeviceError, InputError
from russet.hardware import facts as facts_module
from russet.hardware.facts import GIB, Facts, best_device, mac, parse_version, read_facts


def test_a_mac_is_written_down_in_a_few_words():
    facts = mac("M1", memory_gib=8, macos="14.5", torch="2.13.0")
    assert (facts.device, facts.chip, facts.chip_family) == ("mps", "Apple M1", "M1")
    assert (facts.macos, facts.torch, facts.machine) == ((14, 5), (2, 13, 0), "arm64")
    assert facts.memory == 8 * GIB
    assert facts.mps_available
    assert not facts.rosetta


@pytest.mark.parametrize(
    ("memory_gib", "working_set_mib", "buffer_mib"),
    # as llama.cpp logs recommendedMaxWorkingSetSize and maxBufferLength on Macs of these sizes
    [
        (8, 5461.3, 4096.0),
        (16, 10922.7, 8192.0),
        (32, 21845.3, 16384.0),
        (64, 49152.0, 36864.0),
        (192, 147456.0, 110592.0),
    ],
)
def test_metal_limits_are_those_that_macs_report(memory_gib, working_set_mib, buffer_mib):
    facts = mac("M2 Max", memory_gib=memory_gib)
    assert facts.working_set / 2**20 == pytest.approx(working_set_mib, abs=0.1)
    assert facts.largest_buffer / 2**20 == pytest.approx(buffer_mib, abs=0.1)


@pytest.mark.parametrize(
    ("torch_version", "macos", "bf16"),
    [("2.2.2", "14.0", False), ("2.3.0", "13.6", False), ("2.3.0", "14.0", True), ("2.13.0", "15.1", True)],
)
def test_bfloat16_needs_torch_2_3_and_macos_14(torch_version, macos, bf16):
    assert mac("M3", memory_gib=16, torch=torch_version, macos=macos).bf16 is bf16


@pytest.mark.parametrize("chip", ["Intel", "M", "M2 Super", "M2Pro", ""])
def test_an_unknown_chip_name_is_refused(chip):
    with pytest.raises(InputError, match="chip"):
        mac(chip, memory_gib=8)


@pytest.mark.parametrize("memory_gib", [0, -8, float("nan")])
def test_a_mac_without_memory_is_refused(memory_gib):
    with pytest.raises(InputError, match="memory_gib"):
        mac("M1", memory_gib=memory_gib)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("2.13.0+cu130", (2, 13, 0)),
        ("2.0.0a0+git123", (2, 0, 0)),
        ("14.5", (14, 5)),
        ("15", (15,)),
        (" 1.13.1\n", (1, 13, 1)),
    ],
)
def test_a_version_is_its_leading_numbers(text, version):
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["", "latest", "v2.0"])
def test_text_without_a_leading_number_is_no_version(text):
    with pytest.raises(InputError, match="version"):
        parse_version(text)


def test_the_cpu_is_read_as_psutil_and_torch_see_it():
    facts = read_facts("cpu")
    assert facts.device == "cpu"
    assert facts.chip
    assert facts.torch == parse_version(torch.__version__)
    assert facts.bf16 == any(name in str(facts_module.cpu()[1]) for name in ("amx_bf16", "avx512_bf16"))
    assert facts.python == sys.version_info[:3]
    assert 0 < facts.memory <= psutil.virtual_memory().total
    assert 0 < facts.available <= facts.memory
    assert 0 < facts.budget <= facts.available + facts.held


def test_memory_that_the_process_already_holds_may_be_used_again():
    facts = mac("M1", memory_gib=16, available_gib=2)
    assert dataclasses.replace(facts, held=4 * GIB).budget == pytest.approx(facts.budget + 0.8 * 4 * GIB, abs=2)


def test_a_mac_may_use_no_more_than_its_working_set():
    facts = mac("M1", memory_gib=8, available_gib=8)
    assert facts.budget == facts.limit == facts.working_set


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has mps")
def test_mps_where_there_is_none_is_refused_with_the_reason():
    with pytest.raises(DeviceError, match=r"'mps' is not available here: this is"):
        read_facts("mps")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rosetta": True, "machine": "x86_64"}, "arm64 Python"),
        ({"mps_built": False}, "built without mps"),
        ({"system": "Linux"}, "this is Linux"),
        ({}, "too old"),
    ],
)
def test_why_mps_is_missing_is_told_apart(changes, reason):
    common = {"system": "macOS", "rosetta": False, "machine": "arm64", "mps_built": True, **changes}
    assert reason in facts_module.why_no_mps(common)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_refused():
    with pytest.raises(DeviceError, match="torch sees 0 CUDA devices"):
        read_facts("cuda:3")


def test_an_unknown_kind_of_device_is_refused():
    with pytest.raises(InputError, match="'mps', 'cuda' and 'cpu'"):
        read_facts("xla")


def test_the_best_device_can_be_read():
    assert read_facts().device == best_device()


def test_a_container_sees_its_own_limit(monkeypatch):
    files = {"/sys/fs/cgroup/memory.max": str(4 * GIB), "/sys/fs/cgroup/memory.current": str(GIB)}
    monkeypatch.setattr(facts_module, "read_text", lambda path: files.get(path, ""))
    assert facts_module.within_container(64 * GIB, 60 * GIB) == (4 * GIB, 3 * GIB)
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert facts_module.within_container(64 * GIB, 60 * GIB) == (64 * GIB, 60 * GIB)


def test_the_cpu_of_a_mac_may_swap_and_that_of_a_server_may_not():
    server = Facts(device="cpu", chip="CPU", memory=16 * GIB, available=4 * GIB, torch=(2, 13), system="Linux")
    assert server.limit == server.budget
    assert dataclasses.replace(server, system="macOS").limit == int(0.9 * 16 * GIB)


def test_a_gpu_has_memory_of_its_own():
    gpu = Facts(device="cuda", chip="GPU", memory=8 * GIB, available=6 * GIB, torch=(2, 13))
    assert not gpu.unified
    assert gpu.limit == gpu.budget < 6 * GIB
    assert mac("M1", memory_gib=8).unified


@pytest.mark.parametrize(
    ("flags", "allowed", "amx"),
    [
        ({"amx_tile", "amx_bf16", "avx512_bf16"}, None, True),
        ({"amx_tile", "amx_bf16"}, "AVX512_CORE_BF16", False),
        ({"amx_tile", "amx_bf16"}, "AVX512_CORE_AMX", True),
        ({"avx512_bf16"}, None, False),
        (set(), None, False),
    ],
)
def test_a_cpu_has_matrix_units_where_its_flags_say_so_and_onednn_may_use_them(monkeypatch, flags, allowed, amx):
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    if allowed is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed)
    assert facts_module.has_amx(frozenset(flags)) is amx
