"""Group normalisation (arXiv:1803.08494) with what is added before it and the activation after it, in Triton.

Maps are channels-last: [B, h, w, C] in memory. Sums are float32 whatever the maps are. A small map is normalised by
one kernel, a program for each group of each row. Of a larger one a kernel sums up parts, and a second gathers the sums
and applies them: three passes over the memory, at its speed.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
# The arguments of a kernel have no types that Python knows.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

WHOLE = 256
"""Positions up to which one program normalises a whole group, in two readings that the cache serves."""

ROWS, COLUMNS = 32, 128
"""Positions and channels of a map that one program of the other way takes at a time."""

LEAST, SUMMING, APPLYING = 4, 1024, 2048
"""Times ``ROWS`` that a program sums up at least; and how many programs to each kernel are enough for any GPU."""

PARTS, GROUPS = 32, 32
"""Parts and groups that are gathered at a time."""


@dataclass(frozen=True)
class Sums:
    """Of each part of each group the mean, and the sum of squared distances from it.

    Attributes:
        numbers: [B, parts, 2, groups].
        step: times ``ROWS`` positions to a part.
    """

    numbers: Tensor
    step: int


def group_norm(
    x: Tensor, norm: nn.GroupNorm, silu: bool, shift: Tensor | None, spare: bool = False, told: Sums | None = None
) -> Tensor:
    """Group normalisation of ``x + shift`` [B, C, h, w], then SiLU if wanted; in ``x`` if spare.

    told: the sums of ``x + shift``, if they are known.
    """
    out = x if spare else torch.empty_like(x)
    if told is None and x.shape[2] * x.shape[3] <= WHOLE:
        return normalised(x, out, norm, silu, shift)
    return applied(x, out, told or group_sums(x, norm.num_groups, shift), norm, silu, shift)


def shift_arguments(x: Tensor, shift: Tensor | None) -> tuple[Tensor, int, int]:
    """A shift [1 or B, C], its stride from row to row, and how many channels it is for."""
    if shift is None:
        return x, 0, 0  # any address will do where none is read
    return shift.contiguous(), x.shape[1] if len(shift) > 1 else 0, x.shape[1]


def norm_arguments(x: Tensor, norm: nn.GroupNorm, shift: Tensor | None) -> tuple[Any, ...]:
    """What the kernels that normalise are told: weights, shift, and sizes."""
    channels, area = x.shape[1], x.shape[2] * x.shape[3]
    size = channels // norm.num_groups
    return norm.weight, norm.bias, *shift_arguments(x, shift), area, channels, size, norm.eps


def normalised(x: Tensor, out: Tensor, norm: nn.GroupNorm, silu: bool, shift: Tensor | None) -> Tensor:
    """The whole of it, for small maps."""
    wide = max(16, triton.next_power_of_2(x.shape[1] // norm.num_groups))
    _normalise_group[(norm.num_groups, len(x))](
        x, out, *norm_arguments(x, norm, shift), int(silu), WIDE=wide, BLOCK=max(1, 8192 // wide), num_warps=8
    )
    return out


def group_sums(h: Tensor, groups: int, shift: Tensor | None, x: Tensor | None = None) -> Sums:
    """The sums of ``h + shift`` [B, C, h, w]; or of ``h + shift + x``, which is put into ``h`` then."""
    batch, channels, height, width = h.shape
    area, size = height * width, channels // groups
    wide = size * max(1, min(COLUMNS // size, GROUPS))  # whole groups
    unit = 8 if wide % 8 == 0 else 1
    blocks = triton.cdiv(channels, wide)
    step = max(LEAST, area * batch * blocks // (ROWS * SUMMING))
    parts = triton.cdiv(area, ROWS * step)
    sums = torch.empty(batch, parts, 2, groups, dtype=torch.float32, device=h.device)
    _sum_groups[(parts, blocks, batch)](
        h, h if x is None else x, sums, *shift_arguments(h, shift), area, channels, size, 0 if x is None else area,
        wide // unit, parts, step,
        ROWS=ROWS, COLUMNS=max(COLUMNS, triton.next_power_of_2(wide)), GROUPS=GROUPS, UNIT=unit, num_warps=4,
    )  # fmt: skip
    return Sums(sums, step)


def applied(x: Tensor, out: Tensor, sums: Sums, norm: nn.GroupNorm, silu: bool, shift: Tensor | None) -> Tensor:
    """The norm by these sums, and the activation."""
    batch, channels, height, width = x.shape
    area, size, blocks = height * width, channels // norm.num_groups, triton.cdiv(channels, COLUMNS)
    taken = max(1, area * batch * blocks // (ROWS * APPLYING))
    met = COLUMNS // size if COLUMNS % size == 0 else (COLUMNS - 2) // size + 2  # groups in a block of columns
    _apply_sums[(triton.cdiv(area, ROWS * taken), blocks, batch)](
        x, out, sums.numbers, *norm_arguments(x, norm, shift), norm.num_groups, sums.numbers.shape[1], ROWS * sums.step,
        taken, int(silu),
        ROWS=ROWS, COLUMNS=COLUMNS, GROUPS=max(GROUPS, triton.next_power_of_2(met)), PARTS=PARTS, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["size", "shift_stride", "shifted", "silu"])
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


@triton.jit(do_not_specialize=["shift_stride", "shifted", "size", "both", "units", "parts", "step"])
def _sum_groups(
    h, x, sums, shift, shift_stride, shifted, area, channels, size, both, units, parts, step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: mean and sum of squared distances from it, of some whole groups over some positions of one row."""
    part, row = tl.program_id(0), tl.program_id(2)
    wide = units * UNIT  # so that the compiler knows how many channels can be read at once
    column = tl.arange(0, COLUMNS)
    channel = tl.program_id(1) * wide + column
    there = (column < wide) & (channel < channels)
    added = tl.load(shift + row * shift_stride + channel, mask=channel < shifted, other=0.0).to(tl.float32)
    start = row.to(tl.int64) * area * channels
    first = part * step * ROWS
    pivot = tl.load(x + start + first * channels + channel, mask=there, other=0.0).to(tl.float32) + added
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(step):
        place = first + i * ROWS + tl.arange(0, ROWS)
        mask = (place < area)[:, None] & there[None, :]
        summed = mask & (place < both)[:, None]
        at = start + place[:, None] * channels + channel[None, :]
        values = tl.load(h + at, mask=mask, other=0.0).to(tl.float32) + added[None, :]
        values += tl.load(x + at, mask=summed, other=0.0).to(tl.float32)
        stored = values.to(h.dtype.element_ty)
        tl.store(h + at, stored, mask=summed)
        values = tl.where(summed, stored.to(tl.float32), values)  # of what is stored, the norm is that of the stored
        values = tl.where(mask, values - pivot[None, :], 0.0)  # sums of squares are exact enough near it
        total += values
        squares += values * values
    count = tl.minimum(area - first, step * ROWS).to(tl.float32)
    mean = tl.sum(total, 0) / count
    distance = tl.maximum(tl.sum(squares, 0) - mean * mean * count, 0.0)
    mean += pivot
    group = tl.arange(0, GROUPS)
    own = (column[None, :] // size == group[:, None]) & there[None, :]
    middle = tl.sum(tl.where(own, mean[None, :], 0.0), 1) / size
    away = mean - tl.sum(tl.where(own, middle[:, None], 0.0), 0)
    distance = tl.sum(tl.where(own, (distance + away * away * count)[None, :], 0.0), 1)
    groups = channels // size
    at = (row * parts + part) * 2 * groups + tl.program_id(1) * (wide // size) + group
    held = (group < wide // size) & (tl.program_id(1) * (wide // size) + group < groups)
    tl.store(sums + at, middle, mask=held)
    tl.store(sums + at + groups, distance, mask=held)


@triton.jit(do_not_specialize=["size", "shift_stride", "shifted", "groups", "parts", "rows", "step", "silu"])
def _apply_sums(
    x, out, sums, weight, bias, shift, shift_stride, shifted, area, channels, size, eps, groups, parts, rows, step,
    silu, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program: ``act(norm(x + shift))`` for some channels at some positions of one row."""
    row = tl.program_id(2)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = channel < channels
    group = tl.program_id(1) * COLUMNS // size + tl.arange(0, GROUPS)
    told = sums + row * parts * 2 * groups + group
    pivot = tl.load(told, mask=group < groups, other=0.0)
    total = tl.zeros([PARTS, GROUPS], tl.float32)
    spread = tl.zeros([PARTS, GROUPS], tl.float32)
    for first in range(0, parts, PARTS):  # means and variances of parts put together (Chan et al. 1979)
        part = first + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (group < groups)[None, :]
        count = tl.minimum(area - part * rows, rows).to(tl.float32)[:, None]
        at = told[None, :] + part[:, None] * 2 * groups
        away = tl.where(mask, tl.load(at, mask=mask, other=0.0) - pivot[None, :], 0.0)
        total += away * count
        spread += tl.load(at + groups, mask=mask, other=0.0) + away * away * count * size
    mean = tl.sum(total, 0) / area
    variance = tl.sum(spread, 0) / (area * size) - mean * mean
    factor = 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    own = channel[None, :] // size == group[:, None]
    mean = tl.sum(tl.where(own, (mean + pivot)[:, None], 0.0), 0)
    scale = tl.sum(tl.where(own, factor[:, None], 0.0), 0)
    scale *= tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    added = tl.load(shift + row * shift_stride + channel, mask=channel < shifted, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32) + (added - mean) * scale
    start = row.to(tl.int64) * area * channels
    for i in range(step):
        place = (tl.program_id(0) * step + i) * ROWS + tl.arange(0, ROWS)
        mask = (place < area)[:, None] & there[None, :]
        at = start + place[:, None] * channels + channel[None, :]
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + offset[None, :]
        values = tl.where(silu != 0, values * tl.sigmoid(values), values)
        tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)
