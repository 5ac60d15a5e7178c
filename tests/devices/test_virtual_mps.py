"""The virtual mps device: each of its rules, allowed and refused."""

from __future__ import annotations

import copy
import os
import platform
import threading

import psutil
import pytest
import torch
from torch.nn import functional as F

from .virtual_mps import Hazard, ProcessAborted, VirtualMac, VirtualTensor, kernels, rules

INSTALLED = kernels.version(torch.__version__)
needs_torch_2 = pytest.mark.skipif(INSTALLED < (2, 0), reason="the installed torch's own parts are other ones")


@pytest.fixture
def mac():
    with VirtualMac() as one:
        yield one


# -- being on the device


def test_to_mps_needs_no_index(mac):
    x = torch.ones(2, 3)
    for there in (
        x.to("mps"),
        x.to(torch.device("mps")),
        x.to(device="mps:0"),
        x.to("mps", torch.float16),
        x.to(x.to("mps")),
    ):
        assert there.device == torch.device("mps:0")
        assert there.is_mps


def test_moving_to_where_it_is_gives_the_tensor_itself(mac):
    x = torch.ones(2, device="mps")
    assert x.to("mps") is x
    assert x.to(torch.float32) is x
    assert x.contiguous() is x


@pytest.mark.parametrize(
    "make",
    [
        lambda d: torch.zeros(2, device=d),
        lambda d: torch.full((2,), 3.0, device=d),
        lambda d: torch.arange(3, device=d),
        lambda d: torch.linspace(0, 1, 3, device=d),
        lambda d: torch.eye(2, device=d),
        lambda d: torch.tensor([1.0, 2.0], device=d),
        lambda d: torch.as_tensor([1, 2], device=d),
        lambda d: torch.ones(2).to(d).new_tensor([4.0]),
        lambda d: torch.ones(2).to(d).new_zeros(3),
        lambda d: torch.zeros_like(torch.ones(2), device=d),
        lambda d: torch.tril(torch.ones(3, 3, device=d)),
    ],
)
def test_every_factory_makes_tensors_of_the_device(mac, make):
    there = make("mps")
    assert there.device.type == "mps"
    assert torch.equal(there.cpu(), make("cpu"))


@needs_torch_2
def test_a_default_device_is_heeded(mac):
    torch.set_default_device("mps")
    try:
        assert torch.ones(2).device.type == "mps"
    finally:
        torch.set_default_device(None)


OPERATIONS = {
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "linear": lambda x: F.linear(x, x[0], x[0, :, 0]),
    "conv2d": lambda x: F.conv2d(x[None], x[None].transpose(0, 1)[:2].expand(2, 2, 4, 6)[..., :3, :3], padding=1),
    "group_norm": lambda x: F.group_norm(x[None], 2),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "silu and gelu": lambda x: F.gelu(F.silu(x)),
    "softmax": lambda x: x.softmax(-1),
    "nearest": lambda x: F.interpolate(x[None], scale_factor=2.0, mode="nearest"),
    "bilinear": lambda x: F.interpolate(x[None], size=(5, 9), mode="bilinear"),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "cat and chunk": lambda x: torch.cat(x.chunk(2, dim=-1), dim=1),
    "slices": lambda x: x[:, 1:, ::2][..., None, 0],
    "gather by list": lambda x: x[:, [2, 0]],
    "gather by mask": lambda x: x[x > 0],
    "write a slice": lambda x: written(x, (slice(None), 0), 7.0),
    "write by mask": lambda x: written(x, x > 0, 0.0),
    "in place": lambda x: x.clone().mul_(2).add_(1).clamp_(-1, 1),
    "out": lambda x: torch.add(x, x, out=torch.empty_like(x)),
    "out that must grow": lambda x: torch.bmm(x, x.transpose(1, 2), out=torch.empty(0, device=x.device)),
    "strided copy": lambda x: torch.zeros_like(x).transpose(0, 1).copy_(x.transpose(0, 1)),
    "cast": lambda x: x.half().float(),
    "integers": lambda x: torch.arange(6, device=x.device).view(2, 3).argmax(-1),
    "embedding": lambda x: F.embedding(torch.tensor([1, 0], device=x.device), x[0]),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "moments": lambda x: torch.stack(torch.var_mean(x, dim=-1, unbiased=False)),
    "sort": lambda x: x.sort(-1).values,
    "transposed in place": lambda x: x.clone().transpose_(0, 1),
    "invert": lambda x: ~(x > 0),
    "nonzero": lambda x: (x > 0).nonzero(),
}


def written(x, index, value):
    x = x.clone()
    x[index] = value
    return x


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_values_are_the_cpus_bit_for_bit(mac, name, inference):
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(inference), torch.no_grad():
        expected, found = OPERATIONS[name](x), OPERATIONS[name](x.to("mps"))
    assert isinstance(found, VirtualTensor)
    assert found.shape == expected.shape
    assert torch.equal(found.cpu(), expected)


def test_views_share_their_memory(mac):
    x = torch.zeros(2, 3, device="mps")
    x[0].fill_(1)
    x.view(-1)[4:] = 2
    assert x.tolist() == [[1, 1, 1], [0, 2, 2]]


def test_modules_move_there_and_back(mac):
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).eval()
    x = torch.randn(4, 3)
    expected = layer(x).detach()
    layer.to("mps")
    assert {p.device.type for p in [*layer.parameters(), *layer.buffers()]} == {"mps"}
    assert all(isinstance(p, torch.nn.Parameter) for p in layer.parameters())
    assert torch.equal(layer(x.to("mps")).cpu(), expected)
    twin = copy.deepcopy(layer)
    layer.to("cpu")
    assert torch.equal(layer(x).detach(), expected)
    assert torch.equal(twin(x.to("mps")).cpu(), expected)


@pytest.mark.skipif(not hasattr(torch.utils, "swap_tensors"), reason="came with torch 2.3")
def test_parameters_change_device_through_data(mac):
    parameter = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    parameter.data = parameter.data.to("mps").half()
    assert (parameter.device.type, parameter.dtype, parameter.tolist()) == ("mps", torch.float16, [1, 1])
    parameter.data = parameter.data.cpu()
    assert type(parameter) is torch.nn.Parameter


def test_state_dicts_load_into_the_device(mac):
    there, here = torch.nn.Linear(2, 2).to("mps"), torch.nn.Linear(2, 2)
    there.load_state_dict(here.state_dict())
    assert torch.equal(there.weight.cpu(), here.weight)


def test_threads_started_on_the_mac_are_on_it(mac):
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.tensor([1, 2], device="mps")[1].item()))
    thread.start()
    thread.join()
    assert found == [2]


# -- what it refuses


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


# -- what it says of itself


def test_torch_answers_for_the_mac():
    with VirtualMac("M2 Pro", memory_gib=32, macos="14.5", torch="2.12.0") as mac:
        assert torch.__version__ == "2.12.0"
        assert torch.backends.mps.is_available()
        assert torch.backends.mps.is_built()
        assert torch.backends.mps.get_name() == "Apple M2 Pro"
        assert not torch.backends.mps.is_macos_or_newer(15, 0)
        assert torch.mps.recommended_max_memory() == mac.working_set
        kept = torch.zeros(1024, device="mps")
        assert torch.mps.current_allocated_memory() == kept.numel() * kept.element_size()
        del kept
        assert torch.mps.current_allocated_memory() == 0
        assert torch.mps.driver_allocated_memory() == 4096
        torch.mps.empty_cache()
        assert torch.mps.driver_allocated_memory() == 0
        assert (platform.system(), platform.machine(), platform.mac_ver()[0]) == ("Darwin", "arm64", "14.5")
        assert psutil.virtual_memory().total == 32 * 2**30


@needs_torch_2
def test_what_an_older_torch_does_not_have_is_absent():
    with VirtualMac(torch="1.13.1", macos="13.0"):
        assert not hasattr(torch.mps, "synchronize")
        assert not hasattr(F, "scaled_dot_product_attention")
    with VirtualMac(torch="2.4.1"):
        assert hasattr(torch.mps, "synchronize")
        assert not hasattr(torch.mps, "recommended_max_memory")
        assert hasattr(F, "scaled_dot_product_attention")


@pytest.mark.parametrize(("torch_version", "macos"), [("2.12.0", "13.6"), ("2.6.0", "12.6"), ("1.13.1", "12.0")])
def test_a_macos_too_old_for_its_torch_has_no_device(torch_version, macos):
    with VirtualMac(torch=torch_version, macos=macos):
        assert torch.backends.mps.is_built()
        assert not torch.backends.mps.is_available()
        with pytest.raises(RuntimeError, match="The MPS backend is supported on"):
            torch.ones(2).to("mps")


def process_state():
    return (
        torch.__version__,
        torch.Generator,
        torch.backends.mps.is_available,
        hasattr(F, "scaled_dot_product_attention"),
        torch.__future__.get_overwrite_module_params_on_conversion(),
        platform.system,
        psutil.virtual_memory,
        threading.Thread.run,
    )


def test_nothing_leaks_out_of_the_context():
    before = process_state()
    mac = VirtualMac(torch="1.13.1", macos="13.0")

    def fail():
        with mac:
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert process_state() == before
    assert not torch.backends.mps.is_available()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(2, device="mps")


def test_tensors_outlive_the_context_but_are_not_used_outside():
    mac = VirtualMac()
    with mac:
        x = torch.ones(2, device="mps")
    with pytest.raises(RuntimeError, match="after the virtual Mac was left"):
        x + 1
    with mac:
        assert (x + 1).tolist() == [2, 2]


def test_virtual_macs_do_not_nest(mac):
    with pytest.raises(RuntimeError, match="do not nest"), VirtualMac():
        pass


def test_cuda_and_cpu_are_untouched(mac):
    assert not torch.cuda.is_available()
    assert type(torch.ones(2) * 2) is torch.Tensor
    assert rules.check_operands([]) is None


def test_shapes_only_computes_nothing_and_counts_the_same():
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    counted = []
    for shapes_only in (False, True):
        with VirtualMac(shapes_only=shapes_only) as mac, torch.no_grad():
            there = copy.deepcopy(layer).to("mps")
            with mac.measure() as counts:
                y = there(torch.ones(2, 3, 4, 4).to("mps"))
                assert y.cpu().shape == (2, 2)
            counted.append((counts.kernels, counts.views, counts.syncs, counts.bytes, counts.extra))
            assert y.host.is_meta == shapes_only
    assert counted[0] == counted[1]
