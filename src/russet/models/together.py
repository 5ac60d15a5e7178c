"""Linear layers of one input whose weights lie side by side in memory: one product instead of several.

Queries, keys and values of self-attention are one product instead of three, and the time's parts in all residual
blocks one instead of twenty-two. The weights are not stored twice: each layer's are a view of what all share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from russet.elementwise import hooked


class Together:
    """Some linear layers of one input. ``lay`` joins their weights; until then, and if they part, ``product`` is None.

    Not a module: the layers belong to their own modules, under their own names.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        self.rows = [layer.out_features for layer in self.layers]
        self._whole: dict[str, Tensor] = {}

    def lay(self) -> None:
        """Joins the layers' weights, and their biases if all have one, unless they are joined."""
        if self._holds() or not hasattr(Tensor, "untyped_storage"):  # torch 1.13 cannot tell what lies where
            return
        self._whole = {}
        for name in ("weight", "bias"):
            parts = [layer._parameters[name] for layer in self.layers]
            if None in parts:
                continue
            whole = torch.cat([part.detach() for part in parts if part is not None])
            parts_of_whole = whole.split(self.rows)  # type: ignore[no-untyped-call]
            for layer, part in zip(self.layers, parts_of_whole, strict=True):
                layer._parameters[name] = nn.Parameter(part, requires_grad=layer.weight.requires_grad)
            self._whole[name] = whole

    def part(self) -> None:
        """Forgets what is shared, so that the layers' own weights are all that holds memory."""
        self._whole = {}

    def product(self, x: Tensor) -> Tensor | None:
        """What all layers make of ``x`` [..., inputs], side by side; None where their weights are not joined."""
        learns = torch.is_grad_enabled() and self.layers[0].weight.requires_grad
        if learns or not self._holds() or any(hooked(layer) for layer in self.layers):
            return None
        return F.linear(x, self._whole["weight"], self._whole.get("bias"))

    def _holds(self) -> bool:
        """Whether every layer's parameters still are the parts of what was joined."""
        if not self._whole:
            return False
        for name, whole in self._whole.items():
            place, memory = whole.storage_offset(), whole.untyped_storage()._cdata
            for layer in self.layers:
                part = layer._parameters[name]
                assert part is not None, "a layer has a bias for good"
                if part.untyped_storage()._cdata != memory or part.storage_offset() != place:
                    return False
                place += part.numel()
        return True
