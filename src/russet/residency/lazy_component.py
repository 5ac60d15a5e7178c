"""Components as attributes of a pipeline, whose weights wait on disk until one is looked at."""

from __future__ import annotations

from typing import Any

from torch import nn


class Slot:
    """A component as an attribute. To look at a network has the pipeline read what waits, so that nobody sees it empty.

    The pipeline itself goes around this (``pipe.known("unet")``): a network that nobody else has looked at may be
    dropped and read again, unnoticed.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, pipe: Any, owner: Any = None) -> Any:
        if pipe is None:
            return self
        if self.name not in vars(pipe):
            raise AttributeError(f"this {type(pipe).__name__} has no {self.name} any more")
        if isinstance(vars(pipe)[self.name], nn.Module):
            pipe.looked_at(self.name)
        return vars(pipe)[self.name]

    def __set__(self, pipe: Any, value: Any) -> None:
        vars(pipe)[self.name] = value

    def __delete__(self, pipe: Any) -> None:
        if vars(pipe).pop(self.name, self) is self:
            raise AttributeError(f"this {type(pipe).__name__} has no {self.name} any more")
