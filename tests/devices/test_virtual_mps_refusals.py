"""What the virtual mps device refuses, each thing beside what it allows."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional as F

from .virtual_mps import Hazard, ProcessAborted, VirtualMac, kernels

INSTALLED = kernels.version(torch.__version__)
needs_torch_2 = pytest.mark.skipif(INSTALLED < (2, 0), reason="the installed torch's own parts are other ones")


@pytest.fixture
def mac():
    with VirtualMac() as one:
        yield one


def test_float64_is_refused_and_float32_is_not(mac):
    assert torch.ones(2, dtype=torch.float64).to("mps", torch.float32).dtype == torch.float32
    for attempt in (
        lambda: torch.ones(2, dtype=torch.float64).to("mps"),
        lambda: torch.ones(2, device="mps").double(),
        lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
        lambda: torch.ones(2, device="mps").to("cpu", torch.float64),
        lambda: torch.ones(2, device="mps").sum(dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match="float64"):
            attempt()
    with pytest.raises(TypeError, match="complex128"):
        torch.zeros(2, dtype=torch.complex128, device="mps")


@pytest.mark.parametrize(
    ("torch_version", "macos", "allowed"),
    [("2.13.0", "15.0", True), ("2.3.0", "14.0", True), ("2.3.0", "13.6", False), ("2.2.2", "14.0", False)],
)
def test_bfloat16_comes_with_torch_2_3_and_macos_14(torch_version, macos, allowed):
    with VirtualMac(torch=torch_version, macos=macos):
        if allowed:
            assert torch.ones(2, dtype=torch.bfloat16, device="mps").dtype == torch.bfloat16
        else:
            with pytest.raises(TypeError, match=r"(?i)bfloat16"):
                torch.ones(2, dtype=torch.bfloat16, device="mps")


def test_operators_without_a_kernel_are_refused_in_torchs_words(mac):
    x = torch.ones(3, 3, device="mps")
    assert x.tril().sum().item() == 6
    with pytest.raises(
        NotImplementedError, match=r"aten::linalg_eig.* is not currently implemented for the MPS device"
    ):
        torch.linalg.eig(x)


@pytest.mark.parametrize(
    ("call", "last_without"),
    [
        (lambda x: torch.var_mean(x, dim=1), "2.2.2"),
        pytest.param(lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic"), "2.5.1", marks=needs_torch_2),
        pytest.param(
            lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True), "2.6.0", marks=needs_torch_2
        ),
        (lambda x: x.flatten().cumsum(0), "1.13.1"),
    ],
    ids=["var_mean", "bicubic", "bilinear antialiased", "cumsum"],
)
def test_an_older_torch_lacks_the_kernels_that_it_lacked(call, last_without):
    x = torch.randn(1, 2, 4, 4)
    with VirtualMac(torch=last_without), pytest.raises(NotImplementedError):
        call(x.to("mps"))
    with VirtualMac(torch="2.7.0"):
        call(x.to("mps"))


def test_reading_torchs_operators_by_lines_agrees_with_torchgen():
    generator = pytest.importorskip("torchgen.gen")
    keys = pytest.importorskip("torchgen.model").DispatchKey
    folder = generator.os.path.dirname(generator.__file__) + "/packaged/ATen/native/"
    parsed = generator.parse_native_yaml(folder + "native_functions.yaml", folder + "tags.yaml")
    by_name = {function.func.name: function for function in parsed.native_functions}
    generated = {name.strip() for function in parsed.native_functions for name in map(str, function.autogen)}
    read = kernels.installed_operators()
    checked = 0
    for name, function in by_name.items():
        if str(name) in generated:
            continue  # ours has them as the operator that they are made of
        target = by_name.get(function.structured_delegate, function)
        has = {key: parsed.backend_indices[key].has_kernel(function) for key in parsed.backend_indices}
        expected = None
        if parsed.backend_indices[keys.MPS].has_kernel(target):
            expected = kernels.KERNEL
        elif has[keys.CompositeImplicitAutograd]:
            expected = kernels.IMPLICIT
        elif has[keys.CompositeExplicitAutograd] or has[keys.CompositeExplicitAutogradNonFunctional]:
            expected = kernels.COMPOSITE
        assert read[str(name)] == expected, name
        checked += 1
    assert checked > 2000


def test_tensors_of_two_devices_are_refused_but_numbers_are_not(mac):
    x = torch.ones(2, device="mps")
    assert torch.equal((x * torch.tensor(2.0) + 1).cpu(), torch.full((2,), 3.0))
    assert x[torch.tensor([1])].tolist() == [1]  # indices may be on the CPU
    for attempt in (
        lambda: x + torch.ones(2),
        lambda: torch.cat([x, torch.ones(2)]),
        lambda: F.linear(x, torch.ones(2, 2)),
        lambda: F.embedding(torch.tensor([0]), x[None]),
        lambda: torch.ones(2)[x > 0],
    ):
        with pytest.raises(RuntimeError, match="device"):
            attempt()


def test_numpy_wants_the_cpu_first(mac):
    x = torch.ones(2, device="mps")
    assert x.cpu().numpy().tolist() == [1, 1]
    with pytest.raises(TypeError, match="convert mps:0 device type tensor to numpy"):
        x.numpy()


def test_operands_of_kernels_have_sizes_that_memory_alone_has_not():
    with VirtualMac(memory_gib=64, shapes_only=True):
        large = torch.empty(2, 2**30, dtype=torch.float16, device="mps")
        assert (large + 1).shape == large.shape  # 2**31 elements, 2**32 bytes
        with pytest.raises(ProcessAborted, match=r"total bytes of NDArray > 2\*\*32"):
            large.float()
        huge = torch.empty(2, 2**30 + 1, dtype=torch.int8, device="mps")
        with pytest.raises(ProcessAborted, match=r"product of dimension sizes > 2\*\*31"):
            huge + 1


def test_too_large_products_are_refused_before_they_are_computed(mac):
    x = torch.ones(1, 40000, 1, device="mps")
    with pytest.raises(ProcessAborted):
        torch.bmm(x, x.transpose(1, 2))


def test_one_buffer_has_its_limit_by_the_macs_memory():
    size = 5 * 2**30
    with VirtualMac(memory_gib=16, shapes_only=True):
        torch.empty(size, dtype=torch.int8, device="mps")
    with (
        VirtualMac(memory_gib=8, shapes_only=True),
        pytest.raises(RuntimeError, match=r"Invalid buffer size: 5\.00 GiB"),
    ):
        torch.empty(size, dtype=torch.int8, device="mps")


def test_memory_runs_out_at_the_watermark(monkeypatch):
    with VirtualMac(memory_gib=8, shapes_only=True):
        kept = [
            torch.empty(2**30, dtype=torch.int8, device="mps") for _ in range(9)
        ]  # 1.7 · 5.33 GiB, more than there is
        with pytest.raises(RuntimeError, match="MPS backend out of memory"):
            torch.empty(2**30, dtype=torch.int8, device="mps")
        kept.pop()
        torch.empty(2**30, dtype=torch.int8, device="mps")
        torch.mps.set_per_process_memory_fraction(1.0)
        with pytest.raises(RuntimeError, match="out of memory"):
            torch.empty(1, device="mps")
    monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "1.0")
    with VirtualMac(memory_gib=8, shapes_only=True):
        os.environ["PYTORCH_MPS_HIGH_WATERMARK_RATIO"] = "0.0"  # in time: nothing was allocated yet
        assert len([torch.empty(2**30, dtype=torch.int8, device="mps") for _ in range(12)]) == 12
    assert os.environ["PYTORCH_MPS_HIGH_WATERMARK_RATIO"] == "1.0"


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, device="mps"),
        lambda: torch.empty_like(torch.ones(3, device="mps")),
        lambda: torch.ones(3, device="mps").new_empty(3),
        lambda: torch.empty_strided((3,), (2,), device="mps"),
        lambda: torch.empty(3, dtype=torch.float16, device="mps"),
    ],
)
def test_uninitialised_memory_is_nan(mac, make):
    assert make().isnan().all()
    assert not make().fill_(1).isnan().any()


def test_uninitialised_integers_are_absurd(mac):
    assert torch.empty(2, dtype=torch.int64, device="mps").tolist() == [2**63 - 1] * 2


def test_non_blocking_copies_are_refused_or_corrupted():
    with VirtualMac():
        x = torch.ones(2).to("mps", non_blocking=False)
        assert x.half().to(torch.float32, non_blocking=True).tolist() == [1, 1]  # within the device there is no hazard
        for attempt in (
            lambda: torch.ones(2).to("mps", non_blocking=True),
            lambda: x.to("cpu", non_blocking=True),
            lambda: x.copy_(torch.ones(2), non_blocking=True),
            lambda: torch.nn.Linear(2, 2).to("mps", non_blocking=True),
        ):
            with pytest.raises(Hazard, match="non_blocking"):
                attempt()
    with VirtualMac(non_blocking="corrupt"):
        assert torch.ones(2).to("mps", non_blocking=True).isnan().all()


def test_random_numbers_of_the_device_are_its_own(mac):
    draw = lambda device: torch.randn(4, device=device, generator=torch.Generator(device).manual_seed(3)).cpu()  # noqa: E731
    assert torch.equal(draw("mps"), draw("mps"))
    assert not torch.equal(draw("mps"), draw("cpu"))
    generator = torch.Generator(device="mps")
    assert isinstance(generator, torch.Generator)
    assert generator.device.type == "mps"
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'mps'"):
        torch.randn(2, generator=generator)
    with pytest.raises(RuntimeError, match="Expected a 'mps' device type for generator but found 'cpu'"):
        torch.randn(2, device="mps", generator=torch.Generator())


@needs_torch_2
def test_manual_seed_seeds_the_devices_stream_and_leaves_the_cpus_alone(mac):
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    first = torch.randn(3, device="mps")
    assert torch.equal(torch.randn(3), expected)
    torch.manual_seed(1)
    assert torch.equal(torch.randn(3, device="mps"), first)
