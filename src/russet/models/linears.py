"""Linear layers by another library than PyTorch's choice, for processors on which that is faster."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from russet import onednn
from russet.models.transformer import Pointwise


class OneDNNLinear(nn.Linear):
    """The same layer, by oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        return onednn.linear(input, self.weight, self.bias)


class OneDNNPointwise(Pointwise):
    """The same for the one that is stored as a convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return onednn.linear(input, self.weight.flatten(1), self.bias)


def set_linears(modules: Iterable[nn.Module], *, by_onednn: bool) -> None:
    """Has every linear layer among modules computed by oneDNN, or by PyTorch's choice again.

    They change their class, not their parameters. Layers of other classes are somebody else's, and left alone.
    """
    pairs: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
        (nn.Linear, OneDNNLinear),
        (Pointwise, OneDNNPointwise),
    )
    changed = dict(pairs if by_onednn else [(ours, own) for own, ours in pairs])
    for module in modules:
        if type(module) in changed:
            module.__class__ = changed[type(module)]
