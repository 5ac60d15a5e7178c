"""Whether weights are numbers: NaN and infinity found on the bits, nearly as fast as memory can be read.

numpy looks, because torch would start threads of its own in each of ours, which get in each other's way, and because
torch 1.13 knows no extremes of half precision.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

# Integers of as many bytes as a floating-point number has.
_INTEGERS: dict[int, Any] = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # which old torch has too

BLOCK = 1 << 20  # bytes that are looked at together, so that a second look finds them in the processor's cache


class _Run(NamedTuple):
    """Tensors of one type that lie one after the other in memory."""

    start: int  # an address
    size: int  # elements
    dtype: torch.dtype
    itemsize: int  # bytes
    names: list[str]

    @property
    def end(self) -> int:
        return self.start + self.size * self.itemsize

    def bits(self) -> Any:
        """The elements as unsigned integers, where they lie."""
        memory: Any = (ctypes.c_ubyte * (self.size * self.itemsize)).from_address(self.start)
        return np.frombuffer(memory, _INTEGERS[self.itemsize])


def is_finite(value: torch.Tensor) -> bool:
    """Whether no element is NaN or Inf."""
    if not value.is_floating_point() or value.numel() == 0:
        return True
    if value.element_size() == 1:  # of the types of 8 bits, some have no infinity
        value = value.to(torch.float16)
    bits = value.contiguous().view(_SIGNED[value.element_size()]).numpy().reshape(-1)
    return _sound(bits.view(_INTEGERS[value.element_size()]), value.dtype)


def broken(values: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of those among tensors on the CPU that hold NaN or Inf.

    Neighbours in memory, such as a mapped file's, are looked at together: most tensors of a model are small.
    """
    runs, suspects = _runs(values)
    for run in runs:
        if not _sound(run.bits(), run.dtype):
            suspects.update(run.names)
    return [name for name in values if name in suspects and not is_finite(values[name])]


def _runs(values: Mapping[str, torch.Tensor]) -> tuple[list[_Run], set[str]]:
    """Runs of neighbours, and the names of what has to be looked at by itself."""
    runs: list[_Run] = []
    others: set[str] = set()
    placed = {name: value for name, value in values.items() if value.is_floating_point() and value.numel()}
    for name, value in sorted(placed.items(), key=lambda item: item[1].data_ptr()):
        start, itemsize, last = value.data_ptr(), value.element_size(), runs[-1] if runs else None
        if itemsize not in _INTEGERS or start % itemsize or not value.is_contiguous():
            others.add(name)
        elif last is not None and (last.dtype, last.end) == (value.dtype, start):
            runs[-1] = last._replace(size=last.size + value.numel())
            last.names.append(name)
        else:
            runs.append(_Run(start, value.numel(), value.dtype, itemsize, [name]))
    return runs, others


def _sound(bits: Any, dtype: torch.dtype) -> bool:
    """Whether floating-point numbers, as unsigned integers, are finite: found without a temporary array.

    The highest bit of an exponent is set from 2 on, which few weights reach. Where none does, one look at memory is
    enough; else NaN and Inf show in the largest number of each sign.
    """
    infinity, sign = _infinity(dtype), 1 << (8 * bits.itemsize - 1)
    signed = f"i{bits.itemsize}"
    length = BLOCK // bits.itemsize
    for start in range(0, len(bits), length):
        block = bits[start : start + length]
        if not int(np.bitwise_or.reduce(block)) & (sign >> 1):
            continue
        if int(np.maximum.reduce(block)) >= sign + infinity or int(np.maximum.reduce(block.view(signed))) >= infinity:
            return False
    return True


@functools.lru_cache
def _infinity(dtype: torch.dtype) -> int:
    """The bits of infinity, as a whole number."""
    value = torch.tensor(math.inf, dtype=dtype, device="cpu")
    return int(value.view(_SIGNED[value.element_size()]))
