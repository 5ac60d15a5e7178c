"""Group normalisation (arXiv:1803.08494) with what is added before it and the activation after it, in Triton.

Maps are channels-last: [B, h, w, C] in memory. Sums are float32 whatever the maps are. Few small groups are normalised
by one kernel, a program for each. Else three kernels share the work: sums of each channel, which whatever writes a map
can give along with it, what they make of each group, and what that makes of the map.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
# The arguments of a kernel have no types that Python knows.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

if TYPE_CHECKING:  # a process that only compiles does without torch
    from torch import Tensor, nn

from russet.backends import norm_heuristics
from russet.backends.norm_heuristics import CHANNELS, PLACES

WHOLE, GROUPS = 256, 256
"""Positions and groups, in all rows, up to which one program normalises a whole group, in two readings.

The cache serves the second. So many groups are at work at once: one kernel's time grows with more, as it does with the
positions. Then three are quicker: 12.9 instead of 30.1 µs for two maps of 320×64×64, 34 instead of 72 for thirty-two of
1280×16×16 (H100, float16).
"""

STAGES = 3
"""Readings that a program which sums up has under way: 84 MB take 37 µs so, and two warps; 51 with one, and four."""


@dataclass(frozen=True)
class ChannelSums:
    """Of each part of each channel the mean, and the sum of squared distances from it.

    Attributes:
        numbers: [B, parts, 2, C].
        places: positions to a part.
    """

    numbers: Tensor
    places: int


def group_norm(
    x: Tensor,
    norm: nn.GroupNorm,
    silu: bool,
    shift: Tensor | None,
    *,
    in_place: bool = False,
    sums: ChannelSums | None = None,
    later_bias: Tensor | None = None,
) -> Tensor:
    """Group normalisation of ``x + shift`` [B, C, h, w], then SiLU if wanted; ``in_place`` in the memory of ``x``.

    sums: those of ``x``, if they are known. later_bias: what is added to ``x`` itself [C] when it has been read.
    """
    import torch

    out = x if in_place else torch.empty_like(x)
    small = x.shape[2] * x.shape[3] <= WHOLE and len(x) * norm.num_groups <= GROUPS
    if small and sums is None and later_bias is None:
        return normalised(x, out, norm, silu, shift)
    return applied(x, out, channel_lines(x, sums or channel_sums(x), norm, shift), silu, later_bias)


def norm_arguments(x: Tensor, norm: nn.GroupNorm, shift: Tensor | None) -> tuple[Any, ...]:
    """The arguments of kernels that know a group: weights, shift, and sizes."""
    channels, area = x.shape[1], x.shape[2] * x.shape[3]
    return norm.weight, norm.bias, *shift_arguments(x, shift), area, channels, channels // norm.num_groups, norm.eps


def shift_arguments(x: Tensor, shift: Tensor | None) -> tuple[Tensor, int, int]:
    """A shift [1 or B, C], its stride from row to row, and how many channels it is for."""
    if shift is None:
        return x, 0, 0  # any address will do where none is read
    return shift.contiguous(), x.shape[1] if len(shift) > 1 else 0, x.shape[1]


def normalised(x: Tensor, out: Tensor, norm: nn.GroupNorm, silu: bool, shift: Tensor | None) -> Tensor:
    """The whole of it, for small maps."""
    wide = max(16, triton.next_power_of_2(x.shape[1] // norm.num_groups))
    _normalise_group[(norm.num_groups, len(x))](
        x, out, *norm_arguments(x, norm, shift), int(silu), WIDE=wide, BLOCK=max(1, 8192 // wide), num_warps=8
    )
    return out


def channel_sums(x: Tensor) -> ChannelSums:
    """The sums of a map [B, C, h, w]."""
    return _summed(x, x, None, None, 0, 0)


def shifted_sum(h: Tensor, x: Tensor | None, shift: Tensor) -> ChannelSums:
    """``h + shift + x`` for maps [B, C, h, w] and a shift [1 or B, C], in the memory of ``h``; gives its sums."""
    return _summed(h, h, shift, x, 0, h.shape[1])


def concatenated(x: Tensor, skip: Tensor) -> tuple[Tensor, ChannelSums]:
    """The channels of [B, C, h, w] and [b, c, h, w] one after another, rows of the second repeated; and its sums."""
    batch, channels, height, width = x.shape
    out = x.new_empty(batch, height, width, channels + skip.shape[1]).permute(0, 3, 1, 2)
    return out, _summed(out, x, None, skip, channels, out.shape[1])


def _summed(out: Tensor, h: Tensor, shift: Tensor | None, x: Tensor | None, first: int, written: int) -> ChannelSums:
    """Sums of what has ``h + shift`` in its first channels, and ``x`` from channel ``first`` on; put into ``out``."""
    import torch

    batch, channels, height, width = out.shape
    area, places = height * width, norm_heuristics.part(batch, channels, height * width)
    parts = triton.cdiv(area, places)
    sums = torch.empty(batch, parts, 2, channels, dtype=torch.float32, device=out.device)
    more, rows = (0, 1) if x is None else (x.shape[1], len(x))
    _sum_channels[(parts, triton.cdiv(channels, CHANNELS), batch)](
        out, h, h if x is None else x, sums, *shift_arguments(h, shift), area, channels, h.shape[1], first, more, rows,
        written, parts, places // PLACES, PLACES=PLACES, CHANNELS=CHANNELS, STAGES=STAGES, num_warps=2,
    )  # fmt: skip
    return ChannelSums(sums, places)


def channel_lines(x: Tensor, sums: ChannelSums, norm: nn.GroupNorm, shift: Tensor | None) -> Tensor:
    """What each channel is multiplied by, and what is added then: [B, 2, C]."""
    batch, parts, _, channels = sums.numbers.shape
    line = sums.numbers.new_empty(batch, 2, channels)
    wide = max(128, triton.next_power_of_2(channels // norm.num_groups))  # one kernel for all of Stable Diffusion's
    _line_of_group[(norm.num_groups, batch)](
        sums.numbers, line, *norm_arguments(x, norm, shift), parts, sums.places, WIDE=wide, BLOCK=16, num_warps=4
    )
    return line


def applied(x: Tensor, out: Tensor, line: Tensor, silu: bool, later: Tensor | None = None) -> Tensor:
    """Each channel times a number, plus another, and the activation; ``later`` [C] is added to ``x``."""
    batch, channels, height, width = x.shape
    area = height * width
    _apply_line[(triton.cdiv(area, PLACES), triton.cdiv(channels, CHANNELS), batch)](
        x, out, line, x if later is None else later, area, channels, 0 if later is None else channels, int(silu),
        PLACES=PLACES, CHANNELS=CHANNELS, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["area", "size", "shift_stride", "shifted", "silu"])
def _normalise_group(
    x, out, weight, bias, shift, shift_stride, shifted, area, channels, size, eps, silu,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one group of one row, its mean and variance, then the result."""
    group, row = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, WIDE)
    there = column < size
    channel = group * size + column
    added = tl.load(shift + row * shift_stride + channel, mask=there & (channel < shifted), other=0.0).to(tl.float32)
    start = row.to(tl.int64) * area * channels
    total = tl.zeros([BLOCK, WIDE], tl.float32)
    squares = tl.zeros([BLOCK, WIDE], tl.float32)
    pivot = tl.load(x + start + group * size).to(tl.float32)  # sums of squares are exact enough near it
    for first in range(0, area, BLOCK):
        place = first + tl.arange(0, BLOCK)
        mask = (place < area)[:, None] & there[None, :]
        values = tl.load(x + start + place[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        values = tl.where(mask, values + added[None, :] - pivot, 0.0)
        total += values
        squares += values * values
    count = area * size
    mean = tl.sum(total) / count
    variance = tl.sum(squares) / count - mean * mean
    scale = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32) / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    offset = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32) + (added - pivot - mean) * scale
    for first in range(0, area, BLOCK):
        place = first + tl.arange(0, BLOCK)
        mask = (place < area)[:, None] & there[None, :]
        at = place[:, None] * channels + channel[None, :]
        values = tl.load(x + start + at, mask=mask, other=0.0).to(tl.float32)
        values = values * scale[None, :] + offset[None, :]
        values = tl.where(silu != 0, values * tl.sigmoid(values), values)
        tl.store(out + start + at, values.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["area", "shift_stride", "shifted", "rows", "parts", "step"])
def _sum_channels(
    out, h, x, sums, shift, shift_stride, shifted, area, channels, own, second, more, rows, written, parts, step,
    PLACES: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: mean and sum of squared distances from it, of some channels over some positions of one row."""
    part, row = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    given = (channel >= second) & (channel < second + more)
    start = row.to(tl.int64) * area
    h += start * own + channel
    x += (row % rows).to(tl.int64) * area * more + (channel - second)
    out += start * channels + channel
    first = part * step * PLACES
    added = tl.load(shift + row * shift_stride + channel, mask=channel < shifted, other=0.0).to(tl.float32)
    pivot = added + tl.load(h + first * own, mask=channel < own, other=0.0).to(tl.float32)
    pivot += tl.load(x + first * more, mask=given, other=0.0).to(tl.float32)
    tl.debug_barrier()  # the sum may be put where this was read
    total = tl.zeros([PLACES, CHANNELS], tl.float32)
    squares = tl.zeros([PLACES, CHANNELS], tl.float32)
    for i in tl.range(0, step, num_stages=STAGES):
        place = (first + i * PLACES + tl.arange(0, PLACES))[:, None]
        inside = place < area
        values = tl.load(h[None, :] + place * own, mask=inside & (channel < own)[None, :], other=0.0).to(tl.float32)
        values += tl.load(x[None, :] + place * more, mask=inside & given[None, :], other=0.0).to(tl.float32)
        values = (values + added[None, :]).to(out.dtype.element_ty)
        tl.store(out[None, :] + place * channels, values, mask=inside & (channel < written)[None, :])
        values = tl.where(inside, values.to(tl.float32) - pivot[None, :], 0.0)  # near it squares are exact enough
        total += values
        squares += values * values
    count = tl.minimum(area - first, step * PLACES).to(tl.float32)
    mean = tl.sum(total, 0) / count
    distance = tl.maximum(tl.sum(squares, 0) - mean * mean * count, 0.0)
    at = sums + (row * parts + part) * 2 * channels + channel
    tl.store(at, mean + pivot, mask=there)
    tl.store(at + channels, distance, mask=there)


@triton.jit(do_not_specialize=["area", "size", "shift_stride", "shifted", "parts", "places"])
def _line_of_group(
    sums, line, weight, bias, shift, shift_stride, shifted, area, channels, size, eps, parts, places,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one group's mean and variance out of its parts (Chan et al. 1979), as a line for each channel."""
    group, row = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, WIDE)
    there = column < size
    channel = group * size + column
    added = tl.load(shift + row * shift_stride + channel, mask=there & (channel < shifted), other=0.0).to(tl.float32)
    own_sums = sums + row * parts * 2 * channels + channel
    pivot = tl.load(shift + row * shift_stride + group * size, mask=group * size < shifted, other=0.0).to(tl.float32)
    pivot += tl.load(sums + row * parts * 2 * channels + group * size)
    total = tl.zeros([BLOCK, WIDE], tl.float32)
    spread = tl.zeros([BLOCK, WIDE], tl.float32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        mask = (part < parts)[:, None] & there[None, :]
        count = tl.minimum(area - part * places, places).to(tl.float32)[:, None]
        at = own_sums[None, :] + part[:, None] * 2 * channels
        distance = tl.load(at + channels, mask=mask, other=0.0)
        away = tl.where(mask, tl.load(at, mask=mask, other=0.0) + added[None, :] - pivot, 0.0)
        total += away * count
        spread += distance + away * away * count
    count = (area * size).to(tl.float32)
    mean = tl.sum(total) / count
    variance = tl.maximum(tl.sum(spread) / count - mean * mean, 0.0)
    scale = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    offset = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32) + (added - pivot - mean) * scale
    tl.store(line + row * 2 * channels + channel, scale, mask=there)
    tl.store(line + (row * 2 + 1) * channels + channel, offset, mask=there)


@triton.jit(do_not_specialize=["area", "more", "silu"])
def _apply_line(
    x, out, line, later, area, channels, more, silu, PLACES: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """One program: ``act(scale · x + offset)`` for some channels at some positions of one row."""
    row = tl.program_id(2)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    mask = (place < area)[:, None] & there[None, :]
    scale = tl.load(line + row * 2 * channels + channel, mask=there, other=0.0)
    offset = tl.load(line + (row * 2 + 1) * channels + channel, mask=there, other=0.0)
    at = row.to(tl.int64) * area * channels + place[:, None] * channels + channel[None, :]
    given = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    values = given * scale[None, :] + offset[None, :]
    values = tl.where(silu != 0, values * tl.sigmoid(values), values)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)
    kept = channel < tl.minimum(more, channels)
    given += tl.load(later + channel, mask=kept, other=0.0).to(tl.float32)[None, :]
    tl.store(
        x + at, given.to(x.dtype.element_ty), mask=(place < tl.minimum(area, more * area))[:, None] & there[None, :]
    )
