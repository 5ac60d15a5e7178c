"""Maps that are handed over: free as soon as the last one to read them is done, and not when the call has returned.

An argument is held by all callers until the call returns: by their variables, and by the call itself. What they hold of
a map that is handed over is an empty hand.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from russet.backends.ops import hooked


class Spare:
    """A map that its giver has no more use for, and no other name either; to be taken once."""

    def __init__(self, x: Tensor) -> None:
        self._x: Tensor | None = x

    def take(self) -> Tensor:
        """The map. Whoever calls this is the only one to hold it then."""
        x, self._x = self._x, None
        assert x is not None, "it is taken once"
        return x

    def into(self, layer: nn.Module, *more: Any) -> Tensor:
        """``layer(map, …)``, for a layer that takes what is spare; one that is watched is shown the map itself."""
        return layer(self.take() if hooked(layer) else self, *more)  # type: ignore[no-any-return]


def taken(x: Tensor | Spare) -> Tensor:
    """A map, however it was given."""
    return x.take() if isinstance(x, Spare) else x
