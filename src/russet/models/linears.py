"""Linear layers in another way than PyTorch's: by a library that is faster on a processor, or around a defect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from russet.backends.cpu import onednn
from russet.backends.ops import linear
from russet.models.transformer import Pointwise


class OneDNNLinear(nn.Linear):
    """The same layer, by oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        return onednn.linear(input, self.weight, self.bias)


class OneDNNPointwise(Pointwise):
    """The same for the one that is stored as a convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return onednn.linear(input, self.weight.flatten(1), self.bias)


class FlatLinear(nn.Linear):
    """The same layer on all rows of tokens as one."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class FlatPointwise(Pointwise):
    """The same for the one that is stored as a convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight.flatten(1), self.bias)


KINDS: Mapping[str, tuple[type[nn.Linear], type[Pointwise]]] = {
    "native": (nn.Linear, Pointwise),
    "onednn": (OneDNNLinear, OneDNNPointwise),
    "flat": (FlatLinear, FlatPointwise),
}


def set_linears(modules: Iterable[nn.Module], kind: str) -> None:
    """Has every linear layer among modules computed in one of the ways in ``KINDS``.

    They change their class, not their parameters. Layers of other classes are somebody else's, and left alone.
    """
    changed = {cls: wanted for classes in KINDS.values() for cls, wanted in zip(classes, KINDS[kind], strict=True)}
    for module in modules:
        if type(module) in changed:
            module.__class__ = changed[type(module)]
