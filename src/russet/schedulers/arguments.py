"""Checks of what ``schedule``, ``set_timesteps`` and ``step`` are given, made before any work."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from russet.errors import ArgumentTypeError, InputError, UnsupportedArgument


def one_of(**given: Any) -> None:
    """Raises InputError unless exactly one argument is not None."""
    here = [name for name, value in given.items() if value is not None]
    if len(here) != 1:
        raise InputError(f"give exactly one of {', '.join(given)}, not {' and '.join(here) or 'none'}")


def steps(value: Any, most: int) -> int:
    """The number of steps, 1 .. ``most``, as an int."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentTypeError(f"the number of steps must be a whole number, not {value!r}")
    if not 1 <= (count := operator.index(value)) <= most:
        raise InputError(f"the number of steps must lie in 1..{most} (num_train_timesteps), not {count}")
    return count


def numbers(name: str, values: Any) -> list[float]:
    """A list of finite numbers out of a list, a tuple, an array or a tensor of one dimension."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ArgumentTypeError(f"{name} must be a list of numbers, not {values!r}")
    for value in values:
        if isinstance(value, bool) or not (isinstance(value, (int, float)) or hasattr(value, "__float__")):
            raise ArgumentTypeError(f"{name} must be a list of numbers; {value!r} is none")
    found = [float(value) for value in values]
    if not found or not all(math.isfinite(value) for value in found):
        raise InputError(f"{name} must be finite numbers, at least one, not {values!r}")
    return found


def falling(name: str, values: Sequence[float]) -> None:
    """Raises InputError unless each value is lower than the one before."""
    for before, after in itertools.pairwise(values):
        if after >= before:
            raise InputError(f"{name} must fall from step to step; {after:g} comes after {before:g}")


def inside(name: str, values: Sequence[float], most: float, whole: bool = False) -> None:
    """Raises InputError unless all timesteps are in the table, and whole numbers where they have to be."""
    for value in values:
        if not 0 <= value <= most:
            raise InputError(f"{name} must lie in 0..{most:g}, where the model was trained; {value:g} does not")
        if whole and value != round(value):
            raise InputError(f"{name} must be whole numbers for this scheduler; {value:g} is none")


def known(owner: str, given: Mapping[str, Any], accepted: Mapping[str, Any]) -> None:
    """Raises UnsupportedArgument for a keyword that is not accepted."""
    for name in given:
        if name not in accepted:
            has = f"it has {', '.join(accepted)}" if accepted else "it has no options"
            raise UnsupportedArgument(f"{owner} does not take {name}; {has}")


def fraction(name: str, value: Any) -> float:
    """A number in 0..1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name} must be a number, not {value!r}")
    if not 0 <= value <= 1:
        raise InputError(f"{name} must lie in 0..1, not {value!r}")
    return float(value)


def latents(name: str, value: Any, like: Tensor | None = None) -> Tensor:
    """A floating-point tensor with a batch dimension, of the shape of ``like``."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if not value.is_floating_point() or value.dim() < 2:
        raise InputError(
            f"{name} must be [B, C, h, w] of floating-point numbers, not {list(value.shape)} {value.dtype}"
        )
    if like is not None and value.shape != like.shape:
        raise InputError(f"{name} is {list(value.shape)}, but the sample is {list(like.shape)}")
    return value


def generators(value: Any, batch: int) -> list[Generator]:
    """None, one generator or a list with one for each image, as a list."""
    if value is None or isinstance(value, Generator):
        return [] if value is None else [value]
    if not isinstance(value, Sequence) or not all(isinstance(item, torch.Generator) for item in value):
        raise ArgumentTypeError(f"generator must be a torch.Generator or a list of them, not {value!r}")
    if len(value) != batch:
        raise InputError(f"generator is a list of {len(value)} for a batch of {batch}: give one for each image")
    return list(value)
