"""Numbers as vectors: how a UNet is told the time, the picture size and other scalars."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from russet.models.activations import ACTIVATIONS


def sinusoids(t: Tensor, dim: int, *, cos_first: bool, shift: float) -> Tensor:
    """Sines and cosines of ``t`` at ``dim / 2`` frequencies falling from 1 to about 1/10000 (arXiv:1706.03762).

    Args:
        t: numbers [B] of any dtype.
        dim: length of the result, even.
        cos_first: whether the cosines come before the sines.
        shift: 1 makes the last frequency exactly 1/10000, 0 stops one step short of it.

    Returns:
        [B, dim] float32.
    """
    half = dim // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = t.float()[:, None] * exponents.exp()
    parts = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers that turn a vector [B, inputs] into part of the UNet's time embedding [B, outputs].

    With ``condition`` another vector [B, condition], such as LCM's guidance scale, is projected and added first.
    """

    def __init__(self, inputs: int, outputs: int, act: str = "silu", condition: int | None = None) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.linear_1 = nn.Linear(inputs, outputs)
        self.cond_proj = None if condition is None else nn.Linear(condition, inputs, bias=False)
        self.linear_2 = nn.Linear(outputs, outputs)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None and self.cond_proj is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(self.act(self.linear_1(x)))  # type: ignore[no-any-return]
