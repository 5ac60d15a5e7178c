"""The steps of ``elementwise.py`` as kernels for NVIDIA GPUs, written in Triton.

Maps are channels-last: [B, h, w, C] in memory. Sums are float32 whatever the maps are. Everything here has a reference
in ``elementwise.Plain``, which also takes over what the kernels are not made for: gradients, layouts, dtypes.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
# The arguments of a kernel have no types that Python knows.

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from russet import products_triton as products
from russet.elementwise import PLAIN, Activation, hooked, resized

WHOLE = 256
"""Positions up to which one program normalises a whole group, in two readings that the cache serves.

Beyond, three kernels share the work: 12 instead of 26 µs for two maps of 320×64×64, 103 instead of 215 for thirty-two
(H200, float16).
"""

ROWS, COLUMNS = 32, 128
"""Positions and channels of a map that one program of the other way takes at a time."""


log = logging.getLogger(__name__)


class Fused:
    """The steps in as few passes over the memory as they can be. One object serves all networks."""

    reuses = True

    def __init__(self, silu: Activation, gated_products: bool) -> None:
        self._silu = silu  # the one activation that the kernels know
        self._gated_products = gated_products
        self._prepared: dict[tuple[torch.device, torch.dtype], threading.Thread] = {}
        self._failed = False

    def normed(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        act: Activation | None = None,
        shift: Tensor | None = None,
        *,
        spare: bool = False,
    ) -> Tensor:
        known = act in (None, self._silu) and type(norm) is nn.GroupNorm and not hooked(norm)
        if not known or not takes(x) or self._plain():
            return PLAIN.normed(x if shift is None else x + shift[:, :, None, None], norm, act)
        return group_norm(x, norm, act is not None, shift, spare)

    def convolved(
        self, x: Tensor, conv: nn.Conv2d, shift: Tensor | None = None, *, whole: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if not takes(x) or hooked(conv) or conv.bias is None or self._plain():
            return PLAIN.convolved(x, conv, shift, whole=whole)
        if conv.kernel_size == (1, 1):  # a product, which adds its bias by itself
            y = F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
        else:
            y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
            if not whole:
                shift = conv.bias[None] if shift is None else shift + conv.bias
        return y, shift

    def doubled(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return resized(self, x, conv, (2 * x.shape[2], 2 * x.shape[3]))

    def added(self, h: Tensor, x: Tensor | None, shift: Tensor | None = None) -> Tensor:
        if shift is None or x is None:
            return PLAIN.added(h if shift is None else h.add_(shift[:, :, None, None]), x)
        if not (takes(h) and takes(x) and x.shape == h.shape) or self._plain():
            return PLAIN.added(h.add_(shift[:, :, None, None]), x)
        return shifted_sum(h, x, shift)

    def added_norm(self, h: Tensor, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        if not (takes_tokens(h, norm) and takes_tokens(x, norm) and h.shape == x.shape) or self._plain():
            return PLAIN.added_norm(h, x, norm)
        return h, layer_norm(h, norm, x)

    def layer_norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        taken = takes_tokens(x, norm) and not self._plain()
        return layer_norm(x, norm, None) if taken else PLAIN.layer_norm(x, norm)

    def geglu(self, x: Tensor, proj: nn.Linear) -> Tensor:
        if not (computes(x) and x.is_contiguous()) or hooked(proj) or self._plain():
            return PLAIN.geglu(x, proj)
        whole = self._gated_products and products.takes(x, proj)
        return products.gated_product(x, proj) if whole else gated(proj(x))

    def added_norm_before(
        self, h: Tensor, x: Tensor, norm: nn.LayerNorm, last: nn.Linear
    ) -> tuple[Tensor, Tensor, bool]:
        taken = takes_tokens(h, norm) and takes_tokens(x, norm) and h.shape == x.shape
        if not taken or hooked(last) or last.bias is None or self._plain():
            return *self.added_norm(h, x, norm), False
        return h, layer_norm(h, norm, x, last.bias), True

    def product_added(self, h: Tensor, last: nn.Linear, x: Tensor, ahead: bool) -> Tensor:
        if not ahead:
            return PLAIN.product_added(h, last, x, ahead)
        x.flatten(0, 1).addmm_(h.flatten(0, 1), last.weight.t())  # a passage over the sum less than if added after
        return x

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compiles the kernels for a dtype, beside whatever the program does next; what compiles them may fail."""
        if (device, dtype) not in self._prepared:
            self._prepared[device, dtype] = job = threading.Thread(
                target=self._compile, args=(device, dtype), daemon=True
            )
            job.start()

    def _compile(self, device: torch.device, dtype: torch.dtype) -> None:
        try:
            first, *others = runs(device, dtype, self._gated_products)
            run_on(device, first)  # alone, since Triton itself starts with it
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "compile") as pool:
                list(pool.map(functools.partial(run_on, device), others))
        except Exception as error:  # no compiler, no room for its files: many things that are not ours
            self._failed = True
            log.warning("Triton cannot compile kernels here, so PyTorch's own are used: %s", error)

    def _plain(self) -> bool:
        """Whether there are no kernels. Waits for those that are being compiled."""
        for job in tuple(self._prepared.values()):
            job.join()
        return self._failed


def run_on(device: torch.device, call: Callable[[], object]) -> None:
    """Makes a call on a stream of its own, and waits for its end."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(stream):  # type: ignore[no-untyped-call]
        call()
    stream.synchronize()


def computes(x: Tensor) -> bool:
    """Whether the kernels are made for such a tensor: on a GPU, no gradient wanted, 32-bit places."""
    return x.is_cuda and not (torch.is_grad_enabled() and x.requires_grad) and x.numel() < 2**31


def takes(x: Tensor) -> bool:
    """Whether the kernels take a map: channels-last."""
    return computes(x) and x.is_contiguous(memory_format=torch.channels_last)


def takes_tokens(x: Tensor, norm: nn.LayerNorm) -> bool:
    """Whether the kernels normalise such tokens."""
    plain = type(norm) is nn.LayerNorm and not hooked(norm) and norm.weight is not None and norm.bias is not None
    return computes(x) and x.is_contiguous() and plain and x.shape[-1] <= 8192


# -- kernels
#
# A kernel is compiled for each combination of its constants, a third of a second each. So what varies from layer to
# layer is an argument: where a constant would save a few operations, memory is what these kernels wait for.


def group_norm(x: Tensor, norm: nn.GroupNorm, silu: bool, shift: Tensor | None, spare: bool = False) -> Tensor:
    """Group normalisation (arXiv:1803.08494) of ``x + shift`` [B, C, h, w], then SiLU if wanted; in ``x`` if spare."""
    out = x if spare else torch.empty_like(x)
    if x.shape[2] * x.shape[3] <= WHOLE:
        return normalised(x, out, norm, silu, shift)
    return applied(x, out, lines(x, channel_sums(x), norm, shift), silu)


def group_arguments(x: Tensor, norm: nn.GroupNorm, shift: Tensor | None) -> tuple[Any, ...]:
    """What the kernels that know a group are told: weights, shift, and sizes."""
    channels, area = x.shape[1], x.shape[2] * x.shape[3]
    shifts = norm.bias if shift is None else shift.contiguous()  # any address will do where none is read
    stride = channels if shift is not None and len(shift) > 1 else 0
    size, shifted = channels // norm.num_groups, 0 if shift is None else channels
    return norm.weight, norm.bias, shifts, area, channels, size, stride, norm.eps, shifted


def normalised(x: Tensor, out: Tensor, norm: nn.GroupNorm, silu: bool, shift: Tensor | None) -> Tensor:
    """The whole of it, for small maps."""
    wide = max(16, triton.next_power_of_2(x.shape[1] // norm.num_groups))
    _normalise_group[(norm.num_groups, len(x))](
        x, out, *group_arguments(x, norm, shift), int(silu), WIDE=wide, BLOCK=max(1, 8192 // wide), num_warps=8
    )
    return out


def channel_sums(x: Tensor) -> Tensor:
    """Of each part of each channel the mean, and the sum of squared distances from it: [B, parts, 2, C]."""
    batch, channels, height, width = x.shape
    area = height * width
    step = part_blocks(area)
    parts = triton.cdiv(area, ROWS * step)
    sums = torch.empty(batch, parts, 2, channels, dtype=torch.float32, device=x.device)
    _sum_channels[(parts, triton.cdiv(channels, COLUMNS), batch)](
        x, sums, area, channels, parts, step, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )
    return sums


def part_blocks(area: int) -> int:
    """Blocks of ``ROWS`` positions to a part: few enough parts to be quickly gathered."""
    return min(32, max(4, area // (ROWS * 256)))


def lines(x: Tensor, sums: Tensor, norm: nn.GroupNorm, shift: Tensor | None) -> Tensor:
    """What each channel is multiplied by, and what is added then: [B, 2, C]."""
    batch, parts, _, channels = sums.shape
    line = torch.empty(batch, 2, channels, dtype=torch.float32, device=x.device)
    wide = max(64, triton.next_power_of_2(channels // norm.num_groups))
    rows = ROWS * part_blocks(x.shape[2] * x.shape[3])
    _line_of_group[(norm.num_groups, batch)](
        sums, line, *group_arguments(x, norm, shift), parts, rows, WIDE=wide, BLOCK=64, num_warps=4
    )
    return line


def applied(x: Tensor, out: Tensor, line: Tensor, silu: bool) -> Tensor:
    batch, channels, height, width = x.shape
    area = height * width
    _apply_line[(triton.cdiv(area, ROWS), triton.cdiv(channels, COLUMNS), batch)](
        x, out, line, area, channels, int(silu), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=["size", "shift_stride", "shifted", "silu"])
def _normalise_group(
    x, out, weight, bias, shift, area, channels, size, shift_stride, eps, shifted, silu,
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


@triton.jit(do_not_specialize=["parts", "step"])
def _sum_channels(
    x, sums, area, channels, parts, step, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One program: mean and sum of squared distances from it, of some channels over some positions of one row."""
    part, row = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = channel < channels
    start = row.to(tl.int64) * area * channels
    first = part * step * ROWS
    pivot = tl.load(x + start + first.to(tl.int64) * channels + channel, mask=there, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(step):
        place = first + i * ROWS + tl.arange(0, ROWS)
        mask = (place < area)[:, None] & there[None, :]
        values = tl.load(x + start + place[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        values = tl.where(mask, values - pivot[None, :], 0.0)
        total += values
        squares += values * values
    count = tl.minimum(area - first, step * ROWS).to(tl.float32)
    mean = tl.sum(total, 0) / count
    distance = tl.maximum(tl.sum(squares, 0) - mean * mean * count, 0.0)
    at = sums + (row * parts + part) * 2 * channels + channel
    tl.store(at, mean + pivot, mask=there)
    tl.store(at + channels, distance, mask=there)


@triton.jit(do_not_specialize=["size", "shift_stride", "shifted", "parts", "rows"])
def _line_of_group(
    sums, line, weight, bias, shift, area, channels, size, shift_stride, eps, shifted, parts, rows,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one group's mean and variance out of its parts (Chan et al. 1979), as a line for each channel."""
    group, row = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, WIDE)
    there = column < size
    channel = group * size + column
    added = tl.load(shift + row * shift_stride + channel, mask=there & (channel < shifted), other=0.0).to(tl.float32)
    weighted = tl.zeros([BLOCK, WIDE], tl.float32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        mask = (part < parts)[:, None] & there[None, :]
        count = tl.minimum(area - part * rows, rows).to(tl.float32)
        at = sums + (row * parts + part[:, None]) * 2 * channels + channel[None, :]
        means = tl.load(at, mask=mask, other=0.0) + added[None, :]
        weighted += tl.where(mask, means * count[:, None], 0.0)
    total = area * size
    mean = tl.sum(weighted) / total
    spread = tl.zeros([BLOCK, WIDE], tl.float32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        mask = (part < parts)[:, None] & there[None, :]
        count = tl.minimum(area - part * rows, rows).to(tl.float32)
        at = sums + (row * parts + part[:, None]) * 2 * channels + channel[None, :]
        away = tl.load(at, mask=mask, other=0.0) + added[None, :] - mean
        spread += tl.where(mask, tl.load(at + channels, mask=mask, other=0.0) + away * away * count[:, None], 0.0)
    variance = tl.sum(spread) / total
    scale = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    offset = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32) + (added - mean) * scale
    tl.store(line + row * 2 * channels + channel, scale, mask=there)
    tl.store(line + (row * 2 + 1) * channels + channel, offset, mask=there)


@triton.jit(do_not_specialize=["silu"])
def _apply_line(
    x, out, line, area, channels, silu, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One program: ``act(scale · x + offset)`` for some channels at some positions of one row."""
    row = tl.program_id(2)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = channel < channels
    mask = (place < area)[:, None] & there[None, :]
    scale = tl.load(line + row * 2 * channels + channel, mask=there, other=0.0)
    offset = tl.load(line + (row * 2 + 1) * channels + channel, mask=there, other=0.0)
    at = row.to(tl.int64) * area * channels + place[:, None] * channels + channel[None, :]
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + offset[None, :]
    values = tl.where(silu != 0, values * tl.sigmoid(values), values)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)


def shifted_sum(h: Tensor, x: Tensor, shift: Tensor) -> Tensor:
    """``h + shift + x`` for maps [B, C, h, w] and a shift [1 or B, C], in the memory of ``h``."""
    batch, channels, height, width = h.shape
    area, stride = height * width, channels if len(shift) > 1 else 0
    _shifted_sum[(triton.cdiv(area, ROWS), triton.cdiv(channels, COLUMNS), batch)](
        h, x, shift.contiguous(), area, channels, stride, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )  # fmt: skip
    return h


@triton.jit(do_not_specialize=["shift_stride"])
def _shifted_sum(
    h, x, shift, area, channels, shift_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One program: some channels at some positions of one row."""
    row = tl.program_id(2)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = channel < channels
    mask = (place < area)[:, None] & there[None, :]
    at = row.to(tl.int64) * area * channels + place[:, None] * channels + channel[None, :]
    values = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
    values += tl.load(shift + row * shift_stride + channel, mask=there, other=0.0).to(tl.float32)[None, :]
    values += tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(h + at, values.to(h.dtype.element_ty), mask=mask)


def layer_norm(h: Tensor, norm: nn.LayerNorm, x: Tensor | None, shift: Tensor | None = None) -> Tensor:
    """Layer normalisation (arXiv:1607.06450) of tokens ``h`` [B, N, D], or of ``h + x``.

    That sum is put into ``h``, with ``shift`` [D] added, which is not normalised.
    """
    out = torch.empty_like(h)
    features = h.shape[-1]
    wide = max(512, triton.next_power_of_2(features))
    rows = max(1, 2048 // wide)
    count = h.numel() // features
    _layer_norm[(triton.cdiv(count, rows),)](
        h, h if x is None else x, out, norm.weight, norm.bias, norm.bias if shift is None else shift,
        count, features, norm.eps, 0 if x is None else count, 0 if shift is None else features,
        WIDE=wide, ROWS=rows, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count", "both", "shifted"])
def _layer_norm(
    h, x, out, weight, bias, shift, count, features, eps, both, shifted, WIDE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """One program: some tokens."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDE)
    there = column < features
    mask = (row < count)[:, None] & there[None, :]
    at = row[:, None].to(tl.int64) * features + column[None, :]
    values = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
    summed = mask & (row < both)[:, None]
    values += tl.load(x + at, mask=summed, other=0.0).to(tl.float32)
    values = values.to(h.dtype.element_ty).to(tl.float32)  # what would be stored is what is normalised
    later = tl.load(shift + column, mask=column < shifted, other=0.0).to(tl.float32)
    tl.store(h + at, (values + later[None, :]).to(h.dtype.element_ty), mask=summed)
    mean = tl.sum(values, 1) / features
    away = tl.where(mask, values - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(away * away, 1) / features + eps)
    gain = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    offset = tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    values = away * scale[:, None] * gain[None, :] + offset[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)


def gated(x: Tensor) -> Tensor:
    """``value · GELU(gate)`` for [B, N, 2D] → [B, N, D]."""
    features = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], features)
    _gated[(out.numel() // features, triton.cdiv(features, 512))](x, out, features, BLOCK=512, num_warps=2)
    return out


@triton.jit
def _gated(x, out, features, BLOCK: tl.constexpr):  # fmt: skip
    """One program: some features of one token."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < features
    value = tl.load(x + row * 2 * features + column, mask=there, other=0.0).to(tl.float32)
    gate = tl.load(x + (row * 2 + 1) * features + column, mask=there, other=0.0).to(tl.float32)
    normal = 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    tl.store(out + row * features + column, (value * gate * normal).to(out.dtype.element_ty), mask=there)


def runs(device: torch.device, dtype: torch.dtype, gated_products: bool) -> list[Callable[[], object]]:
    """One call for each kernel and each set of its constants, for the sizes of Stable Diffusion's layers."""

    def blank(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    def norm(channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(32, channels, device=device, dtype=dtype)

    def small(channels: int) -> Callable[[], object]:
        x = channels_last(channels, 8)
        return lambda: normalised(x, torch.empty_like(x), norm(channels), True, None)

    def layer(features: int) -> Callable[[], object]:
        x, layer = blank(1, 64, features), nn.LayerNorm(features, device=device, dtype=dtype)
        return lambda: layer_norm(x, layer, None)

    def channels_last(channels: int, side: int) -> Tensor:
        return blank(1, channels, side, side).contiguous(memory_format=torch.channels_last)

    x, shift, tokens = channels_last(320, 64), blank(1, 320), blank(1, 64, 2560)
    gate = blank(1, 64, 320), nn.Linear(320, 2560, device=device, dtype=dtype)
    sums, line = torch.zeros(1, 32, 2, 320, device=device), torch.zeros(1, 2, 320, device=device)
    return [
        lambda: gated(tokens),
        *map(small, (320, 640, 1280, 2560)),
        lambda: channel_sums(x),
        lambda: lines(x, sums, norm(320), None),
        lambda: applied(x, torch.empty_like(x), line, True),
        *map(layer, (320, 640, 1280)),
        lambda: shifted_sum(x, x, shift),
        *([lambda: products.gated_product(*gate)] if gated_products else []),
    ]
