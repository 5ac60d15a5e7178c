"""Whether weights still are what was read from their file, so that they may be dropped and read again.

A change shows in different ways: a new Parameter or module, other memory (``weight.data = …``), or torch's count of
in-place changes. Only what is written through ``weight.data`` or a NumPy view leaves no trace but the values, which are
compared by a sum of their bits.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from russet.checkpoints.formats.tensor_source import TensorSource
from russet.residency.weights import named

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter or buffer: where it is, and what torch says about it."""

    owner: weakref.ref[nn.Module]
    name: str
    value: weakref.ref[Tensor]
    data_ptr: int
    version: int
    trained: bool

    @classmethod
    def of(cls, owner: nn.Module, name: str, value: Tensor) -> Entry:
        version = 0 if value.is_inference() else value._version
        return cls(weakref.ref(owner), name, weakref.ref(value), value.data_ptr(), version, value.requires_grad)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """All parameters and buffers of a network as they were at one moment; keeps none of them alive."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, network: nn.Module) -> Snapshot:
        return cls(tuple(Entry.of(owner, name, value) for owner, name, value in named(network)))

    def is_of(self, network: nn.Module) -> bool:
        """Whether the network has the same parameters, in the same memory, unwritten as far as torch counts."""
        return self.entries == Snapshot.of(network).entries


def held_elsewhere(network: nn.Module) -> bool:
    """Whether somebody keeps a Parameter of the network, as an optimizer does: it must stay the network's own."""
    return _most_references(network) > _UNHELD


def _most_references(network: nn.Module) -> int:
    most, seen = 0, set()
    for _, _, value in named(network):
        if id(value) not in seen:  # tied weights are referred to from two places
            seen.add(id(value))
            most = max(most, sys.getrefcount(value))
    return most


_UNHELD = _most_references(nn.Linear(1, 1, device="cpu"))


def checksum(x: Tensor) -> int:
    """The sum of the bits of all values, as whole numbers of their size; does not depend on the layout."""
    x = x.detach()
    if x.device.type == "mps":  # which has no 64-bit sums before macOS 13.3
        x = x.cpu()
    return int(x.view(BITS[x.element_size()]).sum(dtype=torch.int64)) if x.dtype != torch.bool else int(x.sum())


def checksums_of_source(sources: Mapping[str, TensorSource], dtype: torch.dtype) -> dict[str, int]:
    """Name → checksum of what is read from the file for a network in ``dtype``."""
    found = {}
    for name, source in sources.items():
        value = source.read(brief=True)
        found[name] = checksum(value.to(dtype) if value.is_floating_point() else value)
    return found


def same_values(network: nn.Module, expected: Mapping[str, int]) -> bool:
    """Whether a network's values are those that the checksums were made from."""
    state = network.state_dict()
    return all(name in state and checksum(state[name]) == value for name, value in expected.items())
