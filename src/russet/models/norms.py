"""Other ways to compute a network's norms, for devices on which torch's own are slow or fail."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from russet.backends.norm_heuristics import at_once


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


def set_norms(modules: Iterable[nn.Module], *, composed_groups: bool, float32_layers: bool) -> None:
    """Has every norm among modules computed in the way that was asked for; False is torch's own.

    They change their class, not their parameters: these are the same, under the same names.
    """
    group: type[nn.GroupNorm] = ComposedGroupNorm if composed_groups else nn.GroupNorm
    layer: type[nn.LayerNorm] = Float32LayerNorm if float32_layers else nn.LayerNorm
    for module in modules:
        if isinstance(module, nn.GroupNorm):
            module.__class__ = group
        elif isinstance(module, nn.LayerNorm):
            module.__class__ = layer
