"""A 3×3 convolution of a map with every pixel taken as 2×2 equal ones, as one transposed convolution; for NVIDIA GPUs.

A result sees 3×3 pixels, of which several are the same one: they are 2×2 pixels of the small map, times sums of
weights. Gathered for all four places of a result within a pixel, these sums are the 4×4 kernel of a transposed
convolution with stride 2 and padding 1. So four ninths of the multiplications are left, and the doubled map, four times
the size of its origin, is never made. In half precision the sums of weights are rounded: 3.2e-4 of the results' root
mean square.

Times on an H100, float16, channels-last, weights made, µs:

    channels@side → twice the side, rows     1280@16  640@32, two    1280@8, 1280@16, 640@32, thirty-two
    doubled, then convolved                      112     140            394     1520     1905
    transposed                                    96      64            224      752      745
                                              512@64  512@128  256@256, one
    doubled, then convolved                      182      665      902
    transposed                                    83      273      319

The weights are not kept: Stable Diffusion 1.5's UNet alone would take 118 MiB for them. One kernel makes them in each
call, laid as cuDNN wants them for channels-last maps (in another layout it would convert them, which takes longer).
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
# The arguments of a kernel have no types that Python knows.

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from russet.backends.upsample_heuristics import SIDE, pays

if TYPE_CHECKING:  # a process that only compiles does without torch
    from torch import Tensor, nn

INPUTS, OUTPUTS = 64, 32
"""Channels in and out of the weights that one program takes at a time: whole sectors of memory, read and written."""


def takes(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether the convolution of a doubled map [B, C, h, w] is made in this way."""
    import torch

    plain = conv.stride == conv.dilation == conv.padding == (1, 1) and conv.kernel_size == (3, 3) and conv.groups == 1
    own = type(conv) is torch.nn.Conv2d and conv.padding_mode == "zeros"
    alike = x.dtype == conv.weight.dtype and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return plain and own and alike and pays(len(x), *conv.weight.shape[1::-1], *x.shape[2:])


def upsampled(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of a map [B, Cin, h, w], doubled, with weights [Cout, Cin, 3, 3] → [B, Cout, 2·h, 2·w]."""
    from torch.nn import functional as F

    return F.conv_transpose2d(x, gathered_weights(weight), stride=2, padding=1)


def gathered_weights(weight: Tensor) -> Tensor:
    """The transposed convolution's weights [Cin, Cout, 4, 4], channels-last: sums of the 3×3 ones in float32, rounded.

    Along a side the four are w₂, w₂ + w₁, w₁ + w₀ and w₀.
    """
    outputs, inputs = weight.shape[:2]
    out = weight.new_empty(inputs, SIDE, SIDE, outputs)
    _gathered[(triton.cdiv(inputs, INPUTS), triton.cdiv(outputs, OUTPUTS), SIDE)](
        weight, out, inputs, outputs, *weight.stride(), INPUTS=INPUTS, OUTPUTS=OUTPUTS, num_warps=8
    )
    return out.permute(0, 3, 1, 2)


@triton.jit
def _gathered(
    weight, out, inputs, outputs, per_output, per_input, down, across, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr
):  # fmt: skip
    """One program: one row of the 4×4 weights for some channels, which are read along inputs, written along outputs."""
    i = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(2)
    upper = (o < tl.where(row > 0, outputs, 0))[:, None] & (i < inputs)[None, :]
    lower = (o < tl.where(row < 3, outputs, 0))[:, None] & (i < inputs)[None, :]
    at = weight + o[:, None] * per_output + i[None, :] * per_input + (2 - row) * down
    left = tl.load(at, mask=lower, other=0.0).to(tl.float32)
    left += tl.load(at + down, mask=upper, other=0.0).to(tl.float32)
    middle = tl.load(at + across, mask=lower, other=0.0).to(tl.float32)
    middle += tl.load(at + down + across, mask=upper, other=0.0).to(tl.float32)
    right = tl.load(at + 2 * across, mask=lower, other=0.0).to(tl.float32)
    right += tl.load(at + down + 2 * across, mask=upper, other=0.0).to(tl.float32)
    to = out + (i[:, None] * 4 + row) * 4 * outputs + o[None, :]
    there = (i < inputs)[:, None] & (o < outputs)[None, :]
    tl.store(to, tl.trans(right).to(out.dtype.element_ty), mask=there)
    tl.store(to + outputs, tl.trans(right + middle).to(out.dtype.element_ty), mask=there)
    tl.store(to + 2 * outputs, tl.trans(middle + left).to(out.dtype.element_ty), mask=there)
    tl.store(to + 3 * outputs, tl.trans(left).to(out.dtype.element_ty), mask=there)
