"""The virtual mps device: each of its rules, allowed and refused."""

from __future__ import annotations

import copy
import platform
import threading

import psutil
import pytest
import torch
from torch.nn import functional as F

from .virtual_mps import VirtualMac, VirtualTensor, kernels, rules

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
    "conv2d": lambda x: F.conv2d(
        x[None], x[None].transpose(0, 1)[:2].expand(2, 2, 4, 6)[..., :3, :3].contiguous(), padding=1
    ),
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
def test_events_profiler_and_accelerator_answer_too():
    with VirtualMac(torch="2.13.0") as mac:
        began, ended = torch.mps.Event(enable_timing=True), torch.mps.Event(enable_timing=True)
        began.record()
        ended.record()
        with mac.measure() as counts, torch.mps.profiler.profile():
            ended.synchronize()
        assert counts.sync_count == 1
        assert began.elapsed_time(ended) >= 0
        assert ended.query()
        assert mac.events == [began, ended]
        if hasattr(torch, "accelerator"):
            assert torch.accelerator.current_accelerator() == torch.device("mps")
        with pytest.raises(rules.Hazard, match="shader"):
            torch.mps.compile_shader("kernel void nothing() {}")
    with VirtualMac(torch="2.0.1"):
        assert not hasattr(torch.mps, "Event")
        assert not hasattr(torch, "accelerator")


@needs_torch_2
def test_an_event_may_come_late():
    with VirtualMac(late_events=2) as mac:
        event = torch.mps.Event()
        event.record()
        with mac.measure() as counts:
            assert [event.query() for _ in range(4)] == [False, False, True, True]
        assert counts.sync_count == 0


@pytest.mark.parametrize("ask", ["recommended_max_memory", "driver_allocated_memory", "current_allocated_memory"])
@needs_torch_2
def test_a_question_about_memory_starts_the_allocator_which_reads_its_setting_once(ask, monkeypatch):
    monkeypatch.delenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", raising=False)
    with VirtualMac() as mac:
        getattr(torch.mps, ask)()
        monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "1.0")
        torch.zeros(1, device="mps")
        assert mac.account.limit == int(1.7 * mac.working_set)


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
