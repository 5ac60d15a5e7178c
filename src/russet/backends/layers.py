"""Plain layers computed in another way, around defects and slow kernels of a device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from russet.backends.norm_heuristics import at_once
from russet.backends.ops import flat_linear
from russet.models.transformer import GEGLU, TokenProjection


class ComposedGroupNorm(nn.GroupNorm):
    """Group normalisation with weights (arXiv:1803.08494) by plain operations, statistics in float32."""

    def forward(self, input: Tensor) -> Tensor:
        """From [B, C, h, w] to the same."""
        return self._quick(input) if at_once(input.numel()) else self._frugal(input)

    def _quick(self, x: Tensor) -> Tensor:
        """Each group is normalised as a layer is: up to four operations, and two float32 maps at a time."""
        groups = x.reshape(x.shape[0] * self.num_groups, -1).float()
        normed = F.layer_norm(groups, groups.shape[1:], eps=self.eps)
        del groups
        weight, bias = (p[:, None, None] for p in (self.weight, self.bias))
        return torch.addcmul(bias, normed.to(x.dtype).view(x.shape), weight)

    def _frugal(self, x: Tensor) -> Tensor:
        """Twelve operations, and never more than one float32 map."""
        groups = x.view(x.shape[0], self.num_groups, -1, *x.shape[2:])
        wide = groups.float()  # not var_mean, which mps has from torch 2.3 on only
        mean, variance = wide.mean((2, 3, 4), keepdim=True), wide.var((2, 3, 4), unbiased=False, keepdim=True)
        del wide
        scale = (variance + self.eps).rsqrt() * self.weight.float().view(1, self.num_groups, -1, 1, 1)
        out: Tensor = (groups - mean.to(x.dtype)).flatten(1, 2)
        return out.mul_(scale.flatten(1, 2).to(x.dtype)).add_(self.bias[:, None, None])


class Float32LayerNorm(nn.LayerNorm):
    """Layer normalisation (arXiv:1607.06450) in float32, weights included, whatever comes in."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class FlatLinear(nn.Linear):
    """``nn.Linear`` on all rows of tokens as one."""

    def forward(self, input: Tensor) -> Tensor:
        return flat_linear(input, self.weight, self.bias)


class FlatTokenProjection(TokenProjection):
    """``TokenProjection`` on all rows of tokens as one."""

    def forward(self, input: Tensor) -> Tensor:
        return flat_linear(input, self.weight.flatten(1), self.bias)


class PairedLinear(nn.Linear):
    """``nn.Linear`` that never sees a single vector: on M1 and macOS 26 its bias would be dropped (pytorch#188438)."""

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 2 and len(input) == 1:
            return F.linear(input.repeat(2, 1), self.weight, self.bias)[:1]
        return F.linear(input, self.weight, self.bias)


def float32_gelu(x: Tensor) -> Tensor:
    """``F.gelu``, in float32 where half precision ends the process: on mps before torch 2.0 (pytorch#86218)."""
    return F.gelu(x.float()).to(x.dtype)


class Float32GEGLU(GEGLU):
    """``GEGLU`` with its gate in float32."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * float32_gelu(gate)  # type: ignore[no-any-return]
