"""Layer normalisation and gating of tokens, in Triton.

A kernel is compiled for each combination of its constants, a third of a second each. So what varies from layer to layer
is an argument: where a constant would save a few operations, memory is what these kernels wait for.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
# The arguments of a kernel have no types that Python knows.

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:  # a process that only compiles does without torch
    from torch import Tensor, nn


def layer_norm(h: Tensor, norm: nn.LayerNorm, x: Tensor | None, shift: Tensor | None = None) -> Tensor:
    """Layer normalisation (arXiv:1607.06450) of tokens ``h`` [B, N, D], or of ``h + x``.

    That sum is put into ``h``, with ``shift`` [D] added, which is not normalised.
    """
    out = h.new_empty(h.shape)
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
