"""The transformer between the UNet's convolutions, where the picture attends to itself and to the text.

Inside it a map [B, C, h, w] is a row of tokens [B, N = h·w, C]. For a channels-last map that is a view, both ways.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from russet.models.base import Attending


def to_tokens(x: Tensor) -> Tensor:
    """A map [B, C, h, w] as tokens [B, h·w, C]; copies only what is not channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens [B, h·w, C] as a channels-last view [B, C, h, w] with the size of ``like``."""
    batch, _, features = tokens.shape
    return tokens.view(batch, *like.shape[2:], features).permute(0, 3, 1, 2)


class MultiHeadAttention(Attending):
    """Attention of tokens [B, N, D] to themselves, or to ``context`` [B, M, Dc] (arXiv:1706.03762)."""

    def __init__(self, dim: int, heads: int, context: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context or dim, dim, bias=bias)
        self.to_v = nn.Linear(context or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = self.attention(q, k, v, self.scale)
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class GEGLU(nn.Module):
    """A linear layer whose output is gated by the GELU of another one (arXiv:2002.05202)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # In the checkpoints the second layer is number 2: number 1 is the dropout of training.
        self.net = nn.Sequential(GEGLU(dim, dim * 4), nn.Identity(), nn.Linear(dim * 4, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
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

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        # Each sum goes into the output of a linear layer, which that layer does not need for its gradient.
        x = self.attn1(self.norm1(x), context if self.only_cross else None).add_(x)
        x = self.attn2(self.norm2(x), context).add_(x)
        return self.ff(self.norm3(x)).add_(x)  # type: ignore[no-any-return]


class Pointwise(nn.Conv2d):
    """A 1×1 convolution, kept in the checkpoint's shape [Cout, Cin, 1, 1], that works on tokens [B, N, Cin]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.flatten(1), self.bias)


class SpatialTransformer(nn.Module):
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

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """From [B, C, h, w] and text [B, M, Dc] to [B, C, h, w] in the memory format of ``x``."""
        tokens = self.proj_in(to_tokens(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + to_map(self.proj_out(tokens), like=x)  # x first: a sum takes the memory format of its first term
