"""Buffer donation: a tensor that its owner has no more use for, so that its memory is free as soon as it is read.

An argument of a Python call is held by the caller's variables, and by the call itself, until the call returns. A
donated tensor travels in a box that the callee empties.
"""

from __future__ import annotations

from torch import Tensor


class Donated:
    """A tensor to be taken once, by a callee that may overwrite it."""

    def __init__(self, x: Tensor) -> None:
        self._x: Tensor | None = x

    def take(self) -> Tensor:
        """The tensor. Whoever calls this holds the only reference."""
        x, self._x = self._x, None
        assert x is not None, "a donated tensor is taken once"
        return x


def taken(x: Tensor | Donated) -> Tensor:
    """A tensor, donated or not."""
    return x.take() if isinstance(x, Donated) else x
