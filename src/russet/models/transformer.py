"""The transformer between the UNet's convolutions, where the picture attends to itself and to the text.

Inside it a map [B, C, h, w] is a row of tokens [B, N = h·w, C]. For a channels-last map that is a view, both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from russet.backends.ops import gated, hooked, linear, repeated, seen
from russet.models.absorbed import Absorbed
from russet.models.attention import is_fused, widened
from russet.models.base import Attending, Stepping
from russet.models.sums import Summing, attention_sum, carried_bias
from russet.models.text import Text
from russet.models.together import Together


def to_tokens(x: Tensor) -> Tensor:
    """A map [B, C, h, w] as tokens [B, h·w, C]; copies only what is not channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens [B, h·w, C] as a channels-last view [B, C, h, w] with the size of ``like``."""
    batch, _, features = tokens.shape
    return tokens.view(batch, *like.shape[2:], features).permute(0, 3, 1, 2)


class MultiHeadAttention(Summing, Attending):
    """Attention of tokens [B, N, D] to themselves, or to a text (arXiv:1706.03762)."""

    def __init__(self, dim: int, heads: int, context: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context or dim, dim, bias=bias)
        self.to_v = nn.Linear(context or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # number 1 is the dropout of training
        self.features = dim // heads
        self.own = Together([self.to_q, self.to_k, self.to_v]) if context is None else None

    def forward(self, x: Tensor, text: Text | None = None) -> Tensor:
        q, k, v = self._of_itself(x) if text is None else (self._heads(self.to_q(x)), *text.keys_values(self))
        out = self.attention(q, k, v, self.scale)[..., : self.features]
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    @property
    def out(self) -> nn.Linear:
        """The projection of the heads put together."""
        found = self.to_out[0]
        assert isinstance(found, nn.Linear)
        return found

    @property
    def absorbs(self) -> bool:
        """Whether a text can be multiplied into the weights."""
        return is_fused(self.attention) and not any(hooked(layer) for layer in (self, self.to_q, self.out))

    def absorb(self, keys: Tensor, values: Tensor) -> Absorbed:
        """A text in the weights, by what ``to_k`` and ``to_v`` make of it [B, M, C]."""
        return Absorbed.of(self._heads(keys), self._heads(values), self.to_q, self.out, self.scale)

    def lay_sums(self, copies: int | None) -> None:
        apart = copies is None or hooked(self)
        self.sums = None if apart else attention_sum(self.own, self.out, self.heads, self.attention)

    def as_heads(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What ``to_k`` and ``to_v`` make of a text [B, M, C] as heads [B, H, M, D], padded if attention pads them."""
        return widened(self.attention, self._heads(keys)), widened(self.attention, self._heads(values))

    def _of_itself(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, N, D] of the tokens themselves."""
        joined = None if self.own is None else self.own.product(x)
        if joined is None:
            return self._heads(self.to_q(x)), self._heads(self.to_k(x)), self._heads(self.to_v(x))
        joined = joined.view(*joined.shape[:2], 3, self.heads, -1)
        q, k, v = widened(self.attention, joined).transpose(1, 3).unbind(2)
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class GEGLU(Stepping):
    """A linear layer whose output is gated by the GELU of another one (arXiv:2002.05202)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps.geglu(x, self.proj)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # In the checkpoints the second layer is number 2: number 1 is the dropout of training.
        self.net = nn.Sequential(GEGLU(dim, dim * 4), nn.Identity(), nn.Linear(dim * 4, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    @property
    def layers(self) -> tuple[GEGLU, nn.Linear]:
        """The gated layer and the last one."""
        first, last = self.net[0], self.net[2]
        assert isinstance(first, GEGLU)
        assert isinstance(last, nn.Linear)
        return first, last

    def added(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """x [B, N, D] plus what this makes of its norm, but for the last bias."""
        first, last = self.layers
        h = gated(first.proj(first.steps.layer_norm(x, norm)))  # the norm is free as soon as it is multiplied
        return torch.addmm(x.flatten(0, 1), h.flatten(0, 1), last.weight.t()).view_as(x)


class TransformerBlock(Stepping):
    """Self-attention, attention to the text and a feed-forward layer, each added to its input.

    With ``only_cross`` the first attention goes to the text as well.
    """

    def __init__(self, dim: int, heads: int, context: int, only_cross: bool) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = MultiHeadAttention(dim, heads, context if only_cross else None)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = MultiHeadAttention(dim, heads, context)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    @property
    def readers(self) -> list[MultiHeadAttention]:
        """The layers that attend to the text."""
        return [self.attn1, self.attn2] if self.only_cross else [self.attn2]

    @property
    def plain_feed(self) -> bool:
        """Whether the feed-forward layer is no more than its weights: nothing watches it."""
        return not any(hooked(module) for module in (self.ff, self.ff.net, *self.ff.net))

    def forward(self, x: Tensor, text: Text) -> Tensor:
        # Each sum goes into the output of a linear layer, which that layer does not need for its gradient.
        steps = self.steps
        if self.only_cross:
            x = repeated(x, text.rows)
        h = self.attn1(steps.layer_norm(x, self.norm1), text if self.only_cross else None)
        x, normed = steps.added_norm(h, x, self.norm2)
        if text.absorbed(self.attn2) is None:
            x, normed = repeated(x, text.rows), repeated(normed, text.rows)
            if self.plain_feed:
                first, last = self.ff.layers
                x, normed, ahead = steps.added_norm_before(self.attn2(normed, text), x, self.norm3, last)
                return steps.product_added(steps.geglu(normed, first.proj), last, x, ahead)
            x, normed = steps.added_norm(self.attn2(normed, text), x, self.norm3)
        else:
            x = self._read(x, normed, text)
            normed = steps.layer_norm(x, self.norm3)
        return steps.added(self.ff(normed), x)

    def _read(self, x: Tensor, normed: Tensor, text: Text) -> Tensor:
        """x plus what the text says to ``normed``."""
        x, absorbed = repeated(x, text.rows), text.absorbed(self.attn2)
        if absorbed is None:
            return self.steps.added(self.attn2(repeated(normed, text.rows), text), x)
        return absorbed.added(x, normed if len(normed) == 1 else repeated(normed, text.rows))

    # The same in three steps, with sums as parts of products. What a step was given is free when it has returned.

    def own(self, x: Tensor, text: Text) -> Tensor:
        if self.only_cross:
            x = repeated(x, text.rows)
        normed = self.steps.layer_norm(x, self.norm1)
        if self.attn1.sums is not None:
            return self.attn1.sums.added(x, normed, self.attn1.attention, self.attn1.scale)  # type: ignore[no-any-return]
        return self.steps.added(self.attn1(normed, text if self.only_cross else None), x)

    def cross(self, x: Tensor, text: Text) -> Tensor:
        return self._read(x, self.steps.layer_norm(x, self.norm2), text)

    def feed(self, x: Tensor, last: bool) -> Tensor:
        """``last``: the last layer's bias is added elsewhere."""
        return (
            self.ff.added(x, self.norm3) if last else self.steps.added(self.ff(self.steps.layer_norm(x, self.norm3)), x)
        )


class Pointwise(nn.Conv2d):
    """A 1×1 convolution, kept in the checkpoint's shape [Cout, Cin, 1, 1], that works on tokens [B, N, Cin]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.flatten(1), self.bias)


class SpatialTransformer(Summing, Stepping):
    """``depth`` transformer blocks over the positions of a map, added to it (arXiv:2112.10752, section 3.3)."""

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        context: int,
        *,
        groups: int,
        linear: bool,
        only_cross: bool = False,
    ) -> None:
        super().__init__()
        projection = nn.Linear if linear else Pointwise
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context, only_cross) for _ in range(depth)
        )
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, text: Text, *, spare: bool = False) -> Tensor:
        """From [B, C, h, w] and the text's k·B rows to [k·B, C, h, w] in the memory format of ``x``.

        ``spare``: the caller has no more use for ``x``.
        """
        if self.sums is not None:
            return self._summed(x, text)
        tokens, ahead = self._entering(x, spare)
        for block in self.transformer_blocks:
            tokens = block(tokens, text)
        if ahead:
            x = repeated(x, text.rows)
            return to_map(self.steps.product_added(tokens, self.proj_out, to_tokens(x), ahead), like=x)
        x = seen(x, text.rows)
        return x + to_map(self.proj_out(tokens), like=x)  # x first: a sum takes the memory format of its first term

    def lay_sums(self, copies: int | None) -> None:
        blocks = self._blocks
        if blocks and not any(hooked(module) for block in blocks for module in (block, block.ff, *block.ff.net)):
            last = blocks[-1].ff.net[2]
            assert isinstance(last, nn.Linear)
            self.sums = carried_bias(last, self.proj_out)

    def _entering(self, x: Tensor, spare: bool) -> tuple[Tensor, bool]:
        """The tokens of the first block, and whether the last projection's bias is in ``x`` now."""
        if not spare:
            return self.proj_in(to_tokens(self.steps.normed(x, self.norm))), False
        normed, ahead = self.steps.normed_before(x, self.norm, self.proj_out)
        return self.proj_in(to_tokens(normed)), ahead

    @property
    def _blocks(self) -> list[TransformerBlock]:
        return [block for block in self.transformer_blocks if isinstance(block, TransformerBlock)]

    def _summed(self, x: Tensor, text: Text) -> Tensor:
        """The same, with sums as parts of products."""
        tokens = self.proj_in(to_tokens(self.steps.normed(x, self.norm)))
        for block in self._blocks:
            tokens = block.own(tokens, text)
            tokens = block.cross(tokens, text)
            tokens = block.feed(tokens, last=block is self.transformer_blocks[-1])
        x = seen(x, text.rows)
        return x + to_map(linear(tokens, self.proj_out.weight.flatten(1), self.sums), like=x)
