"""Residual sums as part of the matrix product before them: one operation, and one passage over the memory, less.

A product that is added to something is one operation, ``x + a W``, which has no room for a bias. So each bias goes
where it comes to the same:

    a transformer's feed-forward     its bias, carried through the projection behind it, joins that one's
    self-attention's projection      its bias is one more row of W, for which ``a`` has a column of ones
    a residual block's shortcut      its bias joins that of the convolution that it is added to

What is made of the weights for this is theirs of the moment, so it is made for each run and dropped after it
(``Model.lay_sums``, ``Model.drop_sums``).

Letters: B batch, N tokens, H heads, D features of a head, C = H·D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from russet.backends.gemm_heuristics import ONES, PADDED, REPEATED
from russet.backends.ops import hooked, linear
from russet.models.attention import Attention, room, widened
from russet.models.together import Together


class Summing:
    """A module that can add to its input within a product, once ``lay_sums`` has made what that takes."""

    sums: Any = None  # None: it computes as it always does

    def lay_sums(self, copies: int | None) -> None:
        """Makes it, unless something watches the layers. ``copies``: also what needs copies of the weights, for calls
        with so many rows.
        """
        raise NotImplementedError


class ShortcutSum:
    """A residual block's last convolution and its shortcut, which is a product for each row of maps.

    The weights are repeated for all rows: products of operands that are only seen as several are wrong on mps
    (pytorch#180201).
    """

    def __init__(self, conv: nn.Conv2d, shortcut: nn.Conv2d, rows: int) -> None:
        assert conv.bias is not None
        assert shortcut.bias is not None
        self.conv, self.bias = conv, conv.bias + shortcut.bias
        self.weight = shortcut.weight.flatten(1).repeat(rows, 1, 1)

    def added(self, h: Tensor, x: Tensor) -> Tensor:
        """The convolution of h [B, Cout, h, w] plus the shortcut of x [B, Cin, h, w]."""
        h = F.conv2d(h, self.conv.weight, self.bias, self.conv.stride, self.conv.padding)
        return torch.baddbmm(h.flatten(2), self.weight, x.flatten(2)).view_as(h)


def shortcut_sum(conv: nn.Conv2d, shortcut: nn.Conv2d | None, rows: int) -> ShortcutSum | None:
    """The sum of one residual block, where nothing watches its layers and the weights for all rows are small."""
    if shortcut is None or hooked(conv) or hooked(shortcut):
        return None
    small = rows * shortcut.weight.numel() * shortcut.weight.element_size() <= REPEATED
    return ShortcutSum(conv, shortcut, rows) if small else None


class AttentionSum:
    """Self-attention that is added to its input, with the output's bias as a row of weights.

    Queries, keys, values and a one come from one product, side by side for each token. The heads are put together
    again where the values were, next to the one.
    """

    def __init__(self, own: Together, out: nn.Linear, heads: int, attention: Attention) -> None:
        whole = own.weights.whole
        assert whole is not None, "the weights lie side by side"
        self.heads, channels = heads, out.in_features
        dim = channels // heads
        wide = room(attention, dim)
        if wide > dim and 3 * heads * wide * channels * whole.element_size() > PADDED:
            wide = dim  # they are padded in each call then
        self.dim = wide
        rows = heads * wide
        if wide == dim:
            own.weights.lay(spare=ONES)
            inward = own.weights.with_spare
        else:
            inward = whole.new_zeros(3 * rows + ONES, channels)
            inward[:-ONES].view(3 * heads, wide, channels)[:, :dim] = whole.view(3 * heads, dim, channels)
        assert inward is not None
        self.inward = inward
        self.ones = whole.new_zeros(3 * rows + ONES)
        self.ones[-ONES] = 1
        if own.biases.whole is not None:
            self.ones[:-ONES].view(3 * heads, wide)[:, :dim] = own.biases.whole.view(3 * heads, dim)
        self.outward = whole.new_zeros(rows + ONES, out.out_features)
        self.outward[:-ONES].view(heads, wide, -1)[:, :dim] = out.weight.t().reshape(heads, dim, -1)
        self.outward[-ONES] = out.bias

    def added(self, x: Tensor, normed: Tensor, attention: Attention, scale: float) -> Tensor:
        """x [B, N, C] plus what attention makes of ``normed`` [B, N, C], projected."""
        batch, tokens, _ = x.shape
        joined = linear(normed, self.inward, self.ones)
        parts = joined[..., :-ONES].view(batch, tokens, 3, self.heads, self.dim)
        q, k, v = widened(attention, parts).transpose(1, 3).unbind(2)
        out = attention(q, k, v, scale)[..., : self.dim]
        parts[:, :, 2].copy_(out.transpose(1, 2))
        rows = joined.flatten(0, 1)[:, 2 * self.heads * self.dim :]
        return torch.addmm(x.flatten(0, 1), rows, self.outward).view_as(x)


def attention_sum(own: Together | None, out: nn.Linear, heads: int, attention: Attention) -> AttentionSum | None:
    """The sum of one layer, where its weights lie side by side and nothing watches them."""
    if own is None or own.weights.whole is None or hooked(out) or out.bias is None:
        return None
    if own.biased and own.biases.whole is None:
        return None
    return AttentionSum(own, out, heads, attention)


def carried_bias(first: nn.Linear, second: nn.Module) -> Tensor | None:
    """The bias of two layers in a row, as the second one's: W₂ b₁ + b₂; None where something watches them."""
    weight, bias = second.weight, second.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    if hooked(first) or hooked(second):
        return None
    carried = F.linear(first.bias[None].float(), weight.flatten(1).float())[0] + bias.float()
    return carried.to(weight.dtype)
