"""A matrix product that does what follows it as well, for NVIDIA GPUs that copy whole tiles (compute capability 9).

A gated layer writes twice as much as is left of it: the product's output is read again only to be halved. One kernel
that multiplies both halves of the weights and gates what comes out writes half, and reads nothing again. It multiplies
a little slower than cuBLAS, which pays where there is much to write: 643 instead of 798 µs for 131072 tokens of 320
features, 44 instead of 57 for 8192 of them, but 36 instead of 30 for 512 tokens of 1280 (H100, float16).
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs
# The arguments of a kernel have no types that Python knows.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from russet.product_sizes import DEPTH, TILE, gating_pays

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.3
    TensorDescriptor = None


def takes(x: Tensor, proj: nn.Linear) -> bool:
    """Whether the kernel is made for such a product, and quicker."""
    inputs, outputs = proj.in_features, proj.out_features // 2
    able = TensorDescriptor is not None and x.dtype in (torch.float16, torch.bfloat16) and proj.bias is not None
    return able and gating_pays(x.numel() // inputs, inputs, outputs)


def gated_product(x: Tensor, proj: nn.Linear) -> Tensor:
    """GEGLU (arXiv:2002.05202) of ``proj(x)``: [B, N, Din] → [B, N, D], where ``proj`` has 2·D outputs."""
    tokens, weight = x.flatten(0, -2), proj.weight
    features = len(weight) // 2
    out = x.new_empty(*x.shape[:-1], features)
    count = len(tokens)
    _gated_product[(triton.cdiv(count, TILE) * (features // TILE),)](
        TensorDescriptor.from_tensor(tokens, [TILE, DEPTH]),
        TensorDescriptor.from_tensor(weight, [TILE, DEPTH]),
        proj.bias,
        TensorDescriptor.from_tensor(out.flatten(0, -2), [TILE, TILE]),
        count, features, tokens.shape[1],
        TILE=TILE, DEPTH=DEPTH, GROUP=8, num_stages=4, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _gated_product(
    x, weight, bias, out, tokens, features, inputs, TILE: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """One program: one tile of the result. Neighbours in time share their weights, ``GROUP`` tiles of tokens each."""
    across = features // TILE
    group = tl.program_id(0) // (GROUP * across)
    within = tl.program_id(0) % (GROUP * across)
    high = tl.minimum(tl.cdiv(tokens, TILE) - group * GROUP, GROUP)
    row = (group * GROUP + within % high) * TILE
    column = within // high * TILE
    value = tl.zeros([TILE, TILE], tl.float32)
    gate = tl.zeros([TILE, TILE], tl.float32)
    for at in range(0, inputs, DEPTH):
        part = x.load([row, at])
        value = tl.dot(part, weight.load([column, at]).T, value)
        gate = tl.dot(part, weight.load([features + column, at]).T, gate)
    place = column + tl.arange(0, TILE)
    value += tl.load(bias + place).to(tl.float32)[None, :]
    gate += tl.load(bias + features + place).to(tl.float32)[None, :]
    gate = 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    out.store([row, column], (value * gate).to(bias.dtype.element_ty))
