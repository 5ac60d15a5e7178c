"""What the virtual device counts, on examples small enough to count by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .virtual_mps import VirtualMac

FLOAT = 4


@pytest.fixture
def mac():
    with VirtualMac() as one, torch.no_grad():
        yield one


def test_a_sum_of_products_is_two_kernels_and_three_buffers(mac):
    a = torch.ones(10, device="mps")
    with mac.measure() as counts:
        b = a * 2
        b = b + a
    assert counts.kernels == {"mul": 1, "add": 1}
    assert (counts.start, counts.peak, counts.bytes) == (10 * FLOAT, 30 * FLOAT, 20 * FLOAT)
    assert mac.account.live == 20 * FLOAT  # the product is gone
    del a, b
    assert mac.account.live == 0


def test_views_take_no_memory_and_keep_their_storage(mac):
    x = torch.zeros(4, 6, device="mps")
    with mac.measure() as counts:
        parts = [x.view(24), x[1:], x.t(), x.unsqueeze(0).expand(5, 4, 6), *x.chunk(2)]
    assert counts.kernel_count == counts.bytes == 0
    assert sum(counts.views.values()) == 6
    del x
    assert mac.account.live == 24 * FLOAT
    parts.clear()
    assert mac.account.live == 0


def test_in_place_operators_are_kernels_without_memory(mac):
    x = torch.zeros(8, device="mps")
    with mac.measure() as counts:
        x.add_(1).mul_(2)
        torch.add(x, x, out=x)
        x[2:] = 3.0
    assert counts.kernels == {"add": 2, "mul": 1, "fill": 1}
    assert counts.bytes == 0


def test_reshaping_what_is_strided_copies(mac):
    x = torch.zeros(4, 6, device="mps")
    with mac.measure() as counts:
        x.reshape(24)
        x.contiguous()
        x.t().reshape(24)
        x.t().contiguous()
    assert counts.kernels == {"clone": 2}


def test_empty_is_an_allocation_and_no_kernel(mac):
    with mac.measure() as counts:
        x = torch.empty(5, device="mps")
        torch.empty_like(x)
    assert counts.kernel_count == 0
    assert counts.allocations == {"empty": 1, "empty_like": 1}
    assert (counts.peak, counts.bytes) == (2 * 5 * FLOAT, 2 * 5 * FLOAT)


def test_half_precision_takes_half_the_bytes(mac):
    x = torch.zeros(10, device="mps")
    with mac.measure() as counts:
        x.half()
    assert counts.kernels == {"_to_copy": 1}
    assert counts.bytes == 20


@pytest.mark.parametrize(
    ("wait", "reason"),
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: float(x[0]), "item"),
        (lambda x: int(x[0]), "item"),
        (lambda x: bool((x > 0).all()), "item"),
        (lambda x: f"{x.max():.2f}", "item"),
        (lambda x: "abcd"[torch.tensor(1).to(x.device)], "item"),
        (lambda x: torch.zeros(3)[x[0].long()], "item"),
        (lambda x: x.cpu(), "download"),
        (lambda x: x.tolist(), "download"),
        (lambda x: torch.zeros(3).copy_(x), "download"),
        (lambda x: torch.ones(3).to("mps"), "upload"),
        (lambda x: torch.tensor([1.0], device="mps"), "upload"),
        (lambda x: x.copy_(torch.ones(3)), "upload"),
        (lambda x: x[[0, 2]], "upload"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "nonzero"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: torch.allclose(x, x), "allclose"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x.repeat_interleave((x + 1).long()), "repeat_interleave"),
        (lambda x: repr(x), "print"),
        (lambda x: torch.mps.synchronize(), "synchronize"),
    ],
)
def test_every_wait_of_the_host_is_counted(mac, wait, reason):
    x = torch.zeros(3, device="mps")
    with mac.measure() as counts:
        wait(x)
    assert counts.syncs[reason] == 1


def test_work_that_stays_on_the_device_makes_nobody_wait(mac):
    x = torch.randn(2, 3, 8, 8, device="mps")
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()).to("mps")
    with mac.measure() as counts:
        y = layer(x)[:, 1:3].masked_fill(torch.zeros((), dtype=torch.bool, device="mps"), 0.0)
        torch.where(y > 0, y, y * 0.5).clamp(-1, 1).softmax(-1)
    assert counts.sync_count == 0
    assert counts.kernels["convolution"] == counts.kernels["native_group_norm"] == counts.kernels["silu"] == 1


def test_a_linear_layer_is_one_kernel(mac):
    layer, x = nn.Linear(6, 5).to("mps"), torch.randn(2, 3, 6).to("mps")
    with mac.measure() as counts:
        layer(x)
    assert counts.kernels == {"linear": 1}
    assert sum(counts.views.values()) == 0
    assert counts.bytes == 2 * 3 * 5 * FLOAT


def test_group_norm_is_one_kernel_but_in_the_versions_that_decompose_it():
    counted = {}
    for version in ("2.0.1", "2.12.0", "2.13.0"):
        with VirtualMac(torch=version) as mac:
            x = torch.randn(1, 4, 8, 8, device="mps")
            with mac.measure() as counts:
                F.group_norm(x, 2)
            counted[version] = counts.kernel_count
    assert counted["2.0.1"] == counted["2.13.0"] == 1
    assert counted["2.12.0"] == 9


def test_measurements_nest(mac):
    with mac.measure() as outer:
        kept = torch.zeros(100, device="mps")
        with mac.measure() as inner:
            torch.zeros(10, device="mps")
        torch.zeros(50, device="mps")
    assert (inner.start, inner.peak, inner.extra) == (400, 440, 40)
    assert (outer.peak, outer.extra, outer.kernel_count) == (600, 600, 3)
    assert mac.account.live == kept.numel() * FLOAT


def test_a_resized_result_is_accounted_anew(mac):
    out = torch.empty(0, device="mps")
    torch.cat([torch.ones(3, device="mps"), torch.ones(4, device="mps")], out=out)
    assert out.shape == (7,)
    assert mac.account.live == 7 * FLOAT


def test_modules_take_the_bytes_of_their_weights(mac):
    layer = nn.Linear(10, 10).to("mps")
    assert mac.account.live == 110 * FLOAT
    layer.half()
    assert mac.account.live == 110 * 2
    layer.to("cpu")
    assert mac.account.live == 0
