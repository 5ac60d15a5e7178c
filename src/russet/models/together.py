"""Parameters that lie side by side in memory, so that one operation serves several layers.

Queries, keys and values of self-attention are one product instead of three, and the time's parts in all residual
blocks one instead of twenty-two. Nothing is stored twice: each layer's parameter is a view of what all share, under its
own name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from russet.backends.ops import hooked, linear
from russet.models.embeddings import paired


class SideBySide:
    """One parameter of each of some layers, ``name`` in all of them, as one tensor once ``lay`` has joined them."""

    def __init__(self, layers: Sequence[nn.Module], name: str) -> None:
        self.layers = tuple(layers)
        self.name = name
        self._whole: Tensor | None = None
        self._spare = 0

    def lay(self, spare: int = 0) -> None:
        """Joins the parameters, with ``spare`` zeros behind them, if every layer has one and they are not yet."""
        parts = [layer._parameters[self.name] for layer in self.layers]
        if not parts or any(part is None for part in parts) or (self.whole is not None and self._spare >= spare):
            return
        if not hasattr(Tensor, "untyped_storage"):  # torch 1.13 cannot tell what lies where
            return
        there = [part.detach() for part in parts if part is not None]
        whole = torch.cat([*there, *([there[0].new_zeros(spare, *there[0].shape[1:])] if spare else [])])
        cut = whole[: len(whole) - spare].split([len(part) for part in there])  # type: ignore[no-untyped-call]
        for layer, old, new in zip(self.layers, parts, cut, strict=True):
            layer._parameters[self.name] = nn.Parameter(new, requires_grad=old is not None and old.requires_grad)
        self._whole, self._spare = whole, spare

    def part(self) -> None:
        """Forgets what is shared, so that the layers' own parameters are all that holds memory."""
        self._whole = None

    @property
    def whole(self) -> Tensor | None:
        """The joined parameters; None where they are not, or no longer, parts of one tensor, or want a gradient."""
        if self._whole is None:
            return None
        place, memory = self._whole.storage_offset(), self._whole.untyped_storage()._cdata
        for layer in self.layers:
            part = layer._parameters[self.name]
            if part is None or part.untyped_storage()._cdata != memory or part.storage_offset() != place:
                return None
            if hooked(layer) or (part.requires_grad and torch.is_grad_enabled()):
                return None
            place += part.numel()
        return self._whole[: len(self._whole) - self._spare]

    @property
    def with_spare(self) -> Tensor | None:
        """The joined parameters and the zeros behind them."""
        return None if self.whole is None else self._whole


class Together:
    """Linear layers of one input. Not a module: the layers belong to their own modules."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        self.weights, self.biases = SideBySide(layers, "weight"), SideBySide(layers, "bias")
        self.biased = all(layer.bias is not None for layer in layers)

    @property
    def joined(self) -> list[SideBySide]:
        """All parameters that are to lie side by side."""
        return [self.weights, self.biases] if self.biased else [self.weights]

    def product(self, x: Tensor) -> Tensor | None:
        """What all layers make of ``x`` [..., inputs], side by side; None where their weights are not joined."""
        weight, bias = self.weights.whole, self.biases.whole
        return None if weight is None or (self.biased and bias is None) else linear(x, weight, bias)


class TimeTogether(Together):
    """The projections of the time in residual blocks, and the biases of the convolutions that these are added to."""

    def __init__(self, layers: Sequence[nn.Linear], convolutions: Sequence[nn.Conv2d]) -> None:
        super().__init__(layers)
        self.convolutions = SideBySide(convolutions, "bias")

    @property
    def joined(self) -> list[SideBySide]:
        return [*super().joined, self.convolutions]

    def shifts(self, emb: Tensor) -> dict[nn.Module, Tensor]:
        """Projection → what it makes of the embedding [B or 1, time], its convolution's bias added; empty if apart."""
        made, biases = self.product(paired(emb)), self.convolutions.whole
        if made is None or biases is None or made.shape[-1] != len(biases):
            return {}
        rows = [layer.out_features for layer in self.layers]
        parts = (made[: len(emb)] + biases).split(rows, dim=-1)  # type: ignore[no-untyped-call]
        return dict(zip(self.layers, parts, strict=True))
