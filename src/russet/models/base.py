"""What all networks share: a config, a dtype, a device, and attention that is handed to them."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from russet.backends.ops import PLAIN, Elementwise
from russet.component import Component
from russet.config import Config
from russet.errors import ArgumentTypeError
from russet.models.attention import Attention, fused
from russet.models.sums import Summing
from russet.models.together import SideBySide, Together


def require_tensor(name: str, value: object) -> None:
    """Raises ArgumentTypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name} must be a tensor, not {type(value).__name__}")


def as_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as a network takes it: in the network's precision and, on mps, in order.

    There a convolution of half of the channels is wrong from the second row on (pytorch#169342), and one operation on
    two precisions may end the process (pytorch#121025).
    """
    x = x.to(dtype)
    return x.contiguous() if x.device.type == "mps" else x


class Attending(nn.Module):
    """A module that computes attention by the function in ``attention``, which ``Model.set_attention`` replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: Attention = fused


class Stepping(nn.Module):
    """A module that computes its norms, activations and sums by ``steps``, which ``Model.set_elementwise`` replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: Elementwise = PLAIN


def hand(modules: Iterable[nn.Module], *, attention: Attention | None = None, steps: Elementwise | None = None) -> None:
    """Gives modules the functions that they compute by; None leaves what they have."""
    for module in modules:
        if attention is not None and isinstance(module, Attending):
            module.attention = attention
        if steps is not None and isinstance(module, Stepping):
            module.steps = steps


class Model(nn.Module, Component):
    """A network with a config. Its parameters carry the names of the published checkpoints."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.prepared: Hashable = None  # what was last done to the weights so that they can work, and where they lay

    @functools.cached_property
    def size(self) -> int:
        """How many numbers the parameters are."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def set_attention(self, attention: Attention) -> None:
        """Makes every attention layer beneath compute by ``attention``, a function of ``russet.models.attention``.

        Raises:
            ArgumentTypeError: ``attention`` cannot be called.
        """
        if not callable(attention):
            raise ArgumentTypeError(f"attention must be a function of russet.models.attention, not {attention!r}")
        hand(self.modules(), attention=attention)

    def set_elementwise(self, steps: Elementwise) -> None:
        """Makes every module beneath compute its norms, activations and sums by ``steps``."""
        hand(self.modules(), steps=steps)

    def lay_together(self) -> None:
        """Puts weights that are multiplied with one input side by side in memory, so that one product serves them all.

        Parameters keep their names, shapes and values. Moving the network, or giving it other weights, undoes it.
        """
        for parameters in self._side_by_side():
            parameters.lay()

    def lay_sums(self, copies: int | None = None) -> None:
        """Prepares residual sums that are part of a product, until ``drop_sums``; see ``russet.models.sums``.

        copies: also those that need copies of weights, for calls with so many rows.
        """
        for module in self.modules():
            if isinstance(module, Summing):
                module.lay_sums(copies)

    def drop_sums(self) -> None:
        """Computes as before, and frees what ``lay_sums`` made."""
        for module in self.modules():
            if isinstance(module, Summing):
                module.sums = None

    def _side_by_side(self) -> Iterator[SideBySide]:
        for module in self.modules():
            for value in vars(module).values():
                yield from value.joined if isinstance(value, Together) else ()

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Self:
        self.drop_sums()
        for parameters in self._side_by_side():  # each of them is about to move on its own
            parameters.part()
        self.prepared = None
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        put_in_order(self.modules())
        return self


def put_in_order(modules: Iterable[nn.Module]) -> None:
    """Lays the weights of convolutions on mps out contiguously: any others are misread there (pytorch#192212)."""
    for module in modules:
        if isinstance(module, nn.Conv2d) and module.weight.device.type == "mps":
            module.weight.data = module.weight.data.contiguous()
