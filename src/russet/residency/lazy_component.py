"""Components as attributes of a pipeline, whose pending weights are loaded on access."""

from __future__ import annotations

from typing import Any

from torch import nn


class LazyComponent:
    """A component as an attribute. Access to a network has the pipeline load pending weights.

    The pipeline itself goes around this (``pipe.known("unet")``): a network that was never handed out may be dropped
    and read again unnoticed.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, pipe: Any, owner: Any = None) -> Any:
        if pipe is None:
            return self
        if self.name not in vars(pipe):
            raise AttributeError(f"this {type(pipe).__name__} has no {self.name} any more")
        if isinstance(vars(pipe)[self.name], nn.Module):
            pipe.load_on_access(self.name)
        return vars(pipe)[self.name]

    def __set__(self, pipe: Any, value: Any) -> None:
        vars(pipe)[self.name] = value

    def __delete__(self, pipe: Any) -> None:
        if vars(pipe).pop(self.name, self) is self:
            raise AttributeError(f"this {type(pipe).__name__} has no {self.name} any more")
