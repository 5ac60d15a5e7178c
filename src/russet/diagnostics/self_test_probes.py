"""Small computations that go wrong where a known defect is present. Russet itself never computes like this.

Defects that end the whole process are not among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Probe:
    """``compute(device)`` gives what came and what should have come, both float32 on the CPU. ``bug`` is a row's id."""

    bug: str
    dtype: torch.dtype
    compute: Callable[[torch.device], Pair]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(0), device="cpu")


def empty_baddbmm(device: torch.device) -> Pair:
    """With beta 0 the first operand, NaN here, must not be read."""
    q, k = noise(4, 32, 16), noise(4, 16, 32)
    unread = torch.full((4, 32, 32), float("nan"), device=device)
    return torch.baddbmm(unread, q.to(device), k.to(device), beta=0).cpu(), q @ k


def causal_leak(device: torch.device) -> Pair:
    """Changing the last of 77 tokens must not change what the others get."""
    q, k, v = (noise(1, 4, 77, 64).to(device, torch.float16) for _ in range(3))
    changed = k.clone()
    changed[:, :, -1] += 10
    before, after = (F.scaled_dot_product_attention(q, one, v, is_causal=True)[:, :, :-1] for one in (k, changed))
    return after.float().cpu(), before.float().cpu()


def strided_weight(device: torch.device) -> Pair:
    x, weight = noise(8, 32), noise(32, 48)
    return F.linear(x.to(device), weight.to(device).T).cpu(), x @ weight


def strided_convolution(device: torch.device) -> Pair:
    x, weight = noise(1, 16, 8, 8), noise(16, 16, 3, 3)
    return F.conv2d(x.to(device), weight.to(device).transpose(0, 1)).cpu(), F.conv2d(x, weight.transpose(0, 1))


def sliced_channels(device: torch.device) -> Pair:
    x, weight = noise(2, 64, 32, 32), noise(32, 32, 3, 3)
    return F.conv2d(x.to(device).chunk(2, dim=1)[1], weight.to(device)).cpu(), F.conv2d(x[:, 32:], weight)


def scalar_view(device: torch.device) -> Pair:
    x, number = noise(8), noise(8)[3]
    return (x.to(device) * number).cpu(), x * number


def long_contraction(device: torch.device) -> Pair:
    a, b = noise(2, 32, 40000), noise(2, 40000, 32)  # the defect needs 16 rows and columns
    return torch.bmm(a.to(device), b.to(device)).cpu(), torch.bmm(a, b)


def long_matrix(device: torch.device) -> Pair:
    a, b = noise(32, 40000), noise(40000, 32)
    return (a.to(device) @ b.to(device)).cpu(), a @ b


def channels_last(device: torch.device) -> Pair:
    x, weight = noise(2, 32, 16, 16), noise(64, 32, 3, 3)
    there = F.conv2d(x.to(device).contiguous(memory_format=torch.channels_last), weight.to(device), padding=1)
    return (there + there.flip(3)).cpu(), (lambda y: y + y.flip(3))(F.conv2d(x, weight, padding=1))


def tokens(device: torch.device) -> Pair:
    x, weight, bias = noise(2, 64, 128), noise(384, 128), noise(384)
    return F.linear(x.to(device), weight.to(device), bias.to(device)).cpu(), F.linear(x, weight, bias)


def half_tokens(device: torch.device) -> Pair:
    x, weight = (noise(*shape).half() for shape in ((2, 13, 1024), (1024, 1024)))
    came = F.linear(x.to(device), weight.to(device)).float().cpu()
    return came, F.linear(x.float(), weight.float())


def lonely_row(device: torch.device) -> Pair:
    x, weight, bias = noise(1, 32), noise(48, 32), noise(48)
    return F.linear(x.to(device), weight.to(device), bias.to(device)).cpu(), F.linear(x, weight, bias)


def expanded_operand(device: torch.device) -> Pair:
    x, weight = noise(1, 64, 32), noise(2, 32, 48)
    return torch.bmm(x.to(device).expand(2, -1, -1), weight.to(device)).cpu(), torch.bmm(x.expand(2, -1, -1), weight)


PROBES = (
    Probe("empty-baddbmm", torch.float32, empty_baddbmm),
    *((Probe("causal-leak", torch.float16, causal_leak),) if hasattr(F, "scaled_dot_product_attention") else ()),
    Probe("strided-linear", torch.float32, strided_weight),
    Probe("strided-convolution", torch.float32, strided_convolution),
    Probe("sliced-channels", torch.float32, sliced_channels),
    Probe("scalar-views", torch.float32, scalar_view),
    Probe("long-contraction", torch.float32, long_contraction),
    Probe("long-matrix", torch.float32, long_matrix),
    Probe("batched-linear", torch.float32, tokens),
    Probe("batched-linear-m5", torch.float16, half_tokens),
    Probe("dropped-bias", torch.float32, lonely_row),
    Probe("expanded-operands", torch.float32, expanded_operand),
    Probe("channels-last", torch.float32, channels_last),
)
