"""Checks of arguments. Each error names the argument, what is allowed and what was given."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from russet.errors import ArgumentTypeError, InputError, UnsupportedArgument


def integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """A whole number in a range; not a bool."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be a whole number, not {shown(value)}")
    return int(in_range(name, int(value), least, most))


def number(name: str, value: Any, *, least: float | None = None, most: float | None = None) -> float:
    """A finite number in a range; not a bool."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be a number, not {shown(value)}")
    if not math.isfinite(value):
        raise InputError(f"{name} must be finite, not {value}")
    return in_range(name, float(value), least, most)


def scalar(name: str, value: Any) -> float:
    """One number: of Python or NumPy, or a tensor with one element."""
    single = value.numel() == 1 if isinstance(value, Tensor) else hasattr(value, "__float__")
    if not single or isinstance(value, (bool, str)):
        raise ArgumentTypeError(f"{name} must be one number, not {shown(value)}")
    return float(value)


def in_range(name: str, value: float, least: float | None, most: float | None) -> float:
    if least is not None and value < least:
        raise InputError(f"{name} must be at least {least}, not {value}")
    if most is not None and value > most:
        raise InputError(f"{name} must be at most {most}, not {value}")
    return value


def flag(name: str, value: Any) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be True or False, not {shown(value)}")
    return value


def function(name: str, value: Any) -> Callable[..., Any]:
    """A callable."""
    if not callable(value):
        raise ArgumentTypeError(f"{name} must be a function, not {shown(value)}")
    return value  # type: ignore[no-any-return]


def one_of(name: str, value: Any, options: Sequence[str]) -> str:
    """One of a few strings."""
    choices = ", ".join(map(repr, options))
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{name} must be one of {choices}, not {shown(value)}")
    if value not in options:
        raise InputError(f"{name} must be one of {choices}, not {value!r}")
    return value


def texts(name: str, value: Any) -> list[str]:
    """A text or a list of texts, as a list."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ArgumentTypeError(f"{name} must be a text or a list of texts, not {shown(value)}")
    if not value:
        raise InputError(f"{name} is an empty list; give at least one text")
    return list(value)


def numbers_list(name: str, value: Any) -> list[float]:
    """A sequence (list, array or tensor of one dimension) of finite numbers, at least one, as a list."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ArgumentTypeError(f"{name} must be a list of numbers, not {shown(value)}")
    if not value:
        raise InputError(f"{name} is empty: give at least one number")
    return [number(f"{name}[{i}]", item) for i, item in enumerate(value)]


def falling(name: str, values: Sequence[float]) -> None:
    """Raises InputError unless each value is lower than the one before."""
    for before, after in itertools.pairwise(values):
        if after >= before:
            raise InputError(f"{name} must fall from step to step; {after:g} comes after {before:g}")


def timesteps(name: str, values: Sequence[float], last: float, whole: bool = False) -> None:
    """Raises InputError unless all are in 0..last, and with ``whole`` are whole numbers."""
    for t in values:
        if not 0 <= t <= last:
            raise InputError(f"{name} must lie in 0..{last:g}, where the model was trained; {t:g} does not")
        if whole and t != round(t):
            raise InputError(f"{name} must be whole numbers for this scheduler; {t:g} is not")


def exactly_one(ways: Mapping[str, Any]) -> None:
    """Raises InputError unless exactly one of the arguments is given."""
    if len(given := [name for name, value in ways.items() if value is not None]) != 1:
        raise InputError(f"give exactly one of {', '.join(ways)}, not {' and '.join(given) or 'none'}")


def span(name: str, value: Any) -> tuple[float, float]:
    """A part of the interval from 0 to 1: its start and its end."""
    ends = numbers_list(name, value)
    if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= 1:
        raise InputError(f"{name} must be two numbers, 0 <= start < end <= 1, not {shown(value)}")
    return ends[0], ends[1]


def tensor(name: str, value: Any, shape: tuple[int | None, ...]) -> Tensor:
    """A finite floating-point tensor of a shape in which None stands for any size."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name} must be a tensor, not {shown(value)}")
    if not value.is_floating_point():
        raise ArgumentTypeError(f"{name} must hold floating-point numbers, not {value.dtype}")
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    if value.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
        raise InputError(f"{name} must have the shape {wanted}, not {list(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"{name} holds values that are not finite (NaN or infinity)")
    return value


def batch(name: str, value: Any, like: Tensor | None = None) -> Tensor:
    """A floating-point tensor with a batch dimension, of the shape of ``like``. Its values are not checked."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name} must be a tensor, not {shown(value)}")
    if not value.is_floating_point() or value.dim() < 2:
        raise InputError(f"{name} must be floating-point numbers [B, …], not {list(value.shape)} {value.dtype}")
    if like is not None and value.shape != like.shape:
        raise InputError(f"{name} is {list(value.shape)}, but the sample is {list(like.shape)}")
    return value


def generators(value: Any, images: int) -> tuple[Generator, ...]:
    """None, one generator for the batch, or a list with one for each image, as a tuple."""
    if value is None or isinstance(value, Generator):
        return () if value is None else (value,)
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, Generator) for one in value):
        raise ArgumentTypeError(f"generator must be a torch.Generator or a list of them, not {shown(value)}")
    if len(value) != images:
        raise InputError(f"generator is a list of {len(value)} for a batch of {images}: give one for each picture")
    return tuple(value)


def refuse_unknown(given: Mapping[str, Any], known_elsewhere: Mapping[str, str], where: str) -> None:
    """Raises UnsupportedArgument for keyword arguments that ``where`` does not take.

    known_elsewhere: Diffusers' arguments that Russet lacks, each with what to do instead. None is accepted for them.
    """
    for name, value in given.items():
        if name not in known_elsewhere:
            raise UnsupportedArgument(f"{where} has no argument {name!r}; see help({where.split('(')[0]})")
        if value is not None:
            raise UnsupportedArgument(f"{where}: Diffusers has {name!r}, Russet does not: {known_elsewhere[name]}")


def shown(value: Any) -> str:
    """A value as an error message quotes it: its type, and its text where that is short."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    text = repr(value)
    return f"{text} ({type(value).__name__})" if len(text) <= 60 else f"a {type(value).__name__}"
