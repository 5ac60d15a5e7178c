"""Other ways to compute a network's norms, for devices on which torch's own are slow or fail."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ComposedGroupNorm(nn.GroupNorm):
    """Group normalisation with weights (arXiv:1803.08494) by plain operations, statistics in float32."""

    def forward(self, input: Tensor) -> Tensor:
        """From [B, C, h, w] to the same."""
        groups = input.view(input.shape[0], self.num_groups, -1, *input.shape[2:])
        wide = groups.float()  # not var_mean, which older mps lack
        mean, variance = wide.mean((2, 3, 4), keepdim=True), wide.var((2, 3, 4), unbiased=False, keepdim=True)
        del wide
        scale = (variance + self.eps).rsqrt() * self.weight.view(1, self.num_groups, -1, 1, 1)
        out: Tensor = (groups - mean.to(input.dtype)).flatten(1, 2)
        return out.mul_(scale.flatten(1, 2).to(input.dtype)).add_(self.bias[:, None, None])


class Float32LayerNorm(nn.LayerNorm):
    """Layer normalisation (arXiv:1607.06450) in float32, weights included, whatever comes in."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


def set_norms(network: nn.Module, *, composed_groups: bool, float32_layers: bool) -> None:
    """Has every norm of a network computed in the way that was asked for; False is torch's own.

    The modules change their class, not their parameters: these are the same, under the same names.
    """
    group: type[nn.GroupNorm] = ComposedGroupNorm if composed_groups else nn.GroupNorm
    layer: type[nn.LayerNorm] = Float32LayerNorm if float32_layers else nn.LayerNorm
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = group
        elif isinstance(module, nn.LayerNorm):
            module.__class__ = layer
