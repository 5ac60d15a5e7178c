"""The transformer between the UNet's convolutions, where the picture attends to itself and to the text."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from russet.models.base import Attending


class Attention(Attending):
    """Multi-head attention of tokens [B, N, D] to themselves, or to a text [B, M, Dc] (arXiv:1706.03762)."""

    def __init__(self, dim: int, heads: int, context: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.is_cross_attention = context is not None
        self.scale = (dim // heads) ** -0.5
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context or dim, dim, bias=bias)
        self.to_v = nn.Linear(context or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # number 1 is the dropout of training

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (self.split_heads(y) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        out = self.attention(q, k, v, self.scale)
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, N, H·D] as [B, H, N, D]."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class GEGLU(nn.Module):
    """A linear layer whose output is gated by the GELU of another one (arXiv:2002.05202)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # In the checkpoints the second layer is number 2: number 1 is the dropout of training.
        self.net = nn.Sequential(GEGLU(dim, dim * 4), nn.Identity(), nn.Linear(dim * 4, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text and a feed-forward layer, each added to its input.

    With ``only_cross_attention`` the first attention goes to the text as well.
    """

    def __init__(self, dim: int, heads: int, context: int, only_cross_attention: bool) -> None:
        super().__init__()
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, context if only_cross_attention else None)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.only_cross_attention else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))  # type: ignore[no-any-return]


class TokenProjection(nn.Conv2d):
    """A 1×1 convolution, kept in the checkpoint's shape [Cout, Cin, 1, 1], of tokens [B, N, Cin]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.flatten(1), self.bias)


class Transformer2DModel(nn.Module):
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
        only_cross_attention: bool = False,
    ) -> None:
        super().__init__()
        projection = nn.Linear if linear else TokenProjection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, context, only_cross_attention) for _ in range(depth)
        )
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """From a map [B, C, h, w] and a text [B, M, Dc] to [B, C, h, w] in the memory format of ``x``."""
        tokens = self.proj_in(to_tokens(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + to_map(self.proj_out(tokens), like=x)  # x first: a sum takes the memory format of its first term


def to_tokens(x: Tensor) -> Tensor:
    """A map [B, C, h, w] as tokens [B, h·w, C]: a view if it is channels-last, else a copy."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens [B, h·w, C] as a channels-last view [B, C, h, w] with the height and width of ``like``."""
    batch, _, features = tokens.shape
    return tokens.view(batch, *like.shape[2:], features).permute(0, 3, 1, 2)
