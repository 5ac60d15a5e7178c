"""Residual fusion: sums as part of the matrix product before them, one pass over the memory less.

A product that is added to something is one operation, ``x + a W``, which has no room for a bias. So each bias goes
where it comes to the same:

    a transformer's feed-forward     its bias, carried through the projection behind it, joins that one's
    self-attention's projection      its bias is one more row of W, for which ``a`` has a column of ones
    a residual block's shortcut      its bias joins that of the convolution that it is added to

Letters: B batch, N tokens, H heads, D features of a head, C = H·D channels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from russet.backends.blocks.resnet import OptimizedResnet
from russet.backends.blocks.transformer import (
    OptimizedAttention,
    OptimizedFeedForward,
    OptimizedTransformer2D,
    OptimizedTransformerBlock,
)
from russet.backends.gemm_heuristics import ONES, PADDED, REPEATED
from russet.backends.ops import flat_linear
from russet.hardware.facts import gigabytes
from russet.hardware.known_bugs import affected
from russet.models.attention import AttentionFunction, padded, padded_heads, padded_size
from russet.models.transformer import Attention, BasicTransformerBlock
from russet.passes.base import LAYER_BY_LAYER, OPTIMIZED_UNET, Changes, Choices, Footprint, Pass, Situation
from russet.passes.blocks import optimize_blocks
from russet.passes.packed_projections import PackedLinears, packs

LARGEST_SHARE = 50  # of the budget, for copies of weights: one fiftieth


class ShortcutProduct:
    """A residual block's last convolution and its shortcut, which is a product for each row of maps.

    The weights are repeated for all rows: products of operands that are expanded views are wrong on mps
    (pytorch#180201).
    """

    def __init__(self, conv: nn.Conv2d, shortcut: nn.Conv2d, rows: int) -> None:
        assert conv.bias is not None
        assert shortcut.bias is not None
        self.conv, self.bias, self.rows = conv, conv.bias + shortcut.bias, rows
        self.weight = shortcut.weight.flatten(1).repeat(rows, 1, 1)

    def added(self, h: Tensor, x: Tensor) -> Tensor:
        """The convolution of ``h`` [B, Cout, h, w] plus the shortcut of ``x`` [B, Cin, h, w]."""
        h = F.conv2d(h, self.conv.weight, self.bias, self.conv.stride, self.conv.padding)
        return torch.baddbmm(h.flatten(2), self.weight, x.flatten(2)).view_as(h)


class ResidualAttention:
    """Self-attention that is added to its input, with the output's bias as a row of weights.

    Queries, keys, values and a one come from one product, side by side for each token. The heads are put together
    again where the values were, next to the one.
    """

    def __init__(self, layer: OptimizedAttention) -> None:
        own, out = PackedLinears([layer.to_q, layer.to_k, layer.to_v], spare=ONES), layer.to_out[0]
        assert isinstance(out, nn.Linear)
        assert own.weights.with_spare is not None
        whole, heads, channels = own.weights.whole, layer.heads, out.in_features
        dim = channels // heads
        size = padded_size(layer.attention, dim)
        if size > dim and 3 * heads * size * channels * whole.element_size() > PADDED:
            size = dim  # they are padded in each call then
        self.heads, self.dim, rows = heads, size, heads * size
        if size == dim:
            inward = own.weights.with_spare
        else:
            inward = whole.new_zeros(3 * rows + ONES, channels)
            inward[:-ONES].view(3 * heads, size, channels)[:, :dim] = whole.view(3 * heads, dim, channels)
        self.inward = inward
        self.ones = whole.new_zeros(3 * rows + ONES)
        self.ones[-ONES] = 1
        if own.biases is not None:
            self.ones[:-ONES].view(3 * heads, size)[:, :dim] = own.biases.whole.view(3 * heads, dim)
        self.outward = whole.new_zeros(rows + ONES, out.out_features)
        self.outward[:-ONES].view(heads, size, -1)[:, :dim] = out.weight.t().reshape(heads, dim, -1)
        self.outward[-ONES] = out.bias

    def added(self, x: Tensor, normed: Tensor, layer: Attention) -> Tensor:
        """``x`` [B, N, C] plus the projected attention of ``normed`` [B, N, C]."""
        batch, tokens, _ = x.shape
        joined = flat_linear(normed, self.inward, self.ones)
        parts = joined[..., :-ONES].view(batch, tokens, 3, self.heads, self.dim)
        q, k, v = padded_heads(layer.attention, parts).transpose(1, 3).unbind(2)
        out = layer.attention(q, k, v, layer.scale)[..., : self.dim]
        parts[:, :, 2].copy_(out.transpose(1, 2))
        rows = joined.flatten(0, 1)[:, 2 * self.heads * self.dim :]
        return torch.addmm(x.flatten(0, 1), rows, self.outward).view_as(x)


class FusedResiduals:
    """The sums of one transformer. copies: also those of self-attention, which need copies of weights."""

    def __init__(self, transformer: OptimizedTransformer2D, copies: bool) -> None:
        blocks = [block for block in transformer.transformer_blocks if isinstance(block, OptimizedTransformerBlock)]
        feed_forward, proj_out = blocks[-1].ff, transformer.proj_out
        assert isinstance(feed_forward, OptimizedFeedForward)
        assert isinstance(proj_out, (nn.Linear, nn.Conv2d))
        self.bias = carried_bias(feed_forward.last, proj_out)
        self._attention: dict[BasicTransformerBlock, ResidualAttention] = {}
        for block in blocks if copies else ():
            if isinstance(block.attn1, OptimizedAttention) and sums(block.attn1):
                self._attention[block] = ResidualAttention(block.attn1)

    def self_attention(self, block: BasicTransformerBlock) -> ResidualAttention | None:
        return self._attention.get(block)


def carried_bias(first: nn.Linear, second: nn.Linear | nn.Conv2d) -> Tensor:
    """The bias of two layers in a row, as the second one's: W₂ b₁ + b₂."""
    assert second.bias is not None
    carried = F.linear(first.bias[None].float(), second.weight.flatten(1).float())[0] + second.bias.float()
    return carried.to(second.weight.dtype)


def decide(situation: Situation) -> tuple[str, str]:
    facts, decided = situation.facts, situation.decided
    if decided["offload"] == "sequential":
        return "off", LAYER_BY_LAYER
    if bug := affected(facts, "gathered-operands"):
        return "off", f"on this macOS {bug.what}"
    size = copied_bytes(situation)
    if decided.width("unet") > 2:
        return "on", f"fewer kernels; in float32, {gigabytes(size)} for copies of weights would be too much"
    if size > facts.budget // LARGEST_SHARE:
        return "on", f"fewer kernels; {gigabytes(size)} for copies of weights would be too much"
    return "with weight copies", f"fewer kernels; copies of some weights take {gigabytes(size)}"


def apply(network: nn.Module, name: str, choices: Choices, changes: Changes) -> None:
    if name != "unet":
        return
    optimize_blocks(network, changes)
    copies, rows = choices["residual_fusion"] == "with weight copies", choices.rows
    changes.copied = changes.copied or copies
    for module in changes.modules:
        if isinstance(module, OptimizedTransformer2D) and fuses(module):
            changes.set(module, "fused_residuals", FusedResiduals(module, copies))
        if copies and isinstance(module, OptimizedResnet) and (shortcut := module.conv_shortcut) is not None:
            size = rows * shortcut.weight.numel() * shortcut.weight.element_size()
            if size <= REPEATED and shortcut.kernel_size == shortcut.stride == (1, 1) and shortcut.padding == (0, 0):
                changes.set(module, "shortcut_product", ShortcutProduct(module.conv2, shortcut, rows))


def fuses(transformer: OptimizedTransformer2D) -> bool:
    """Whether all blocks of a transformer are as Russet made them, and the biases are there."""
    blocks = transformer.transformer_blocks
    parts = [
        block.ff
        for block in blocks
        if isinstance(block, OptimizedTransformerBlock) and isinstance(block.ff, OptimizedFeedForward)
    ]
    biases = [part.last.bias for part in parts[-1:]] + [transformer.proj_out.bias]
    return 0 < len(parts) == len(blocks) and all(bias is not None for bias in biases)


def sums(layer: OptimizedAttention) -> bool:
    """Whether self-attention can be added within its product, which overwrites the values that it attended to."""
    return packs(layer) and layer.to_out[0].bias is not None and is_own(layer.attention)


def is_own(attention: AttentionFunction) -> bool:
    """Whether a function is one of ours, which keeps nothing of what it was given."""
    inner = getattr(attention, "inner", None)
    return getattr(attention, "__module__", "") == padded.__module__ and (inner is None or is_own(inner))


def copied_bytes(situation: Situation, pad: tuple[int, ...] = ()) -> int:
    """What copies of weights take: of self-attention's output with its bias, of padded heads, of shortcuts repeated."""
    workload, decided = situation.workload, situation.decided
    number, total = decided.width("unet"), 0
    rows = min(decided["micro_batch"], workload.images) * workload.rows
    for stage in workload.unet.stages:
        width, heads = stage.channels, stage.heads
        if stage.depth and not stage.only_cross:
            dim = width // heads
            size = next((one for one in pad if one >= dim), dim)
            inward = 3 * heads * size * width * number
            padded = size > dim and inward <= PADDED
            outward = (heads * (size if padded else dim) + ONES) * width * number
            total += stage.depth * (outward + (inward if padded else 0))
        repeated = rows * stage.inputs * width * number
        total += repeated if stage.inputs != width and repeated <= REPEATED else 0
    return total


def footprint(situation: Situation) -> Footprint:
    copies = situation.decided["residual_fusion"] == "with weight copies"
    kept = copied_bytes(situation, situation.decided.attention("unet").pad) if copies else 0
    return replace(OPTIMIZED_UNET, kept=kept, walk={**OPTIMIZED_UNET.walk, "residual_fusion": True})


PASS = Pass(
    name="residual_fusion",
    meaning="'off'; 'on': the UNet's residual sums and biases are part of matrix products (addmm); 'with weight"
    " copies': also those that need a copy of some weights",
    off="off",
    devices=("mps",),
    elsewhere="the norm kernels compute the sums on CUDA, and a CPU saves nothing with fewer kernels",
    decide=decide,
    apply=apply,
    footprint=footprint,
)
