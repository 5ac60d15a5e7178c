"""Weights of a network, found without calling any of its methods: a network that is not loaded would load itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from russet.models.base import Model

CPU, META = torch.device("cpu"), torch.device("meta")


def submodules(network: nn.Module) -> Iterator[nn.Module]:
    """The network and every module beneath it, each once, before those that it holds."""
    seen: set[int] = set()
    waiting = [network]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        waiting.extend(child for child in reversed([*module.__dict__["_modules"].values()]) if child is not None)


def named(network: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every parameter and buffer beneath with its owner and its name there; one that two modules hold comes twice."""
    for module in submodules(network):
        for kind in ("_parameters", "_buffers"):
            for name, value in module.__dict__[kind].items():
                if value is not None:
                    yield module, name, value


def first(network: nn.Module) -> Tensor | None:
    """One parameter, to ask for device and dtype; a buffer where there is no parameter; None of an empty module."""
    found = None
    for _, _, value in named(network):
        if isinstance(value, nn.Parameter):
            return value
        found = value if found is None else found
    return found


def is_empty(network: nn.Module) -> bool:
    """Whether weights are not in memory. Some of a network that was never loaded may be: it computed them itself."""
    return any(value.device == META for _, _, value in named(network))


def is_at(network: nn.Module, device: torch.device) -> bool:
    """Whether a network's weights are on a device; "cuda" is whichever GPU they are on."""
    value = first(network)
    return value is None or (value.device.type == device.type and device.index in (None, value.device.index))


def nbytes(network: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(
        value.numel() * value.element_size() for _, _, value in named(network) if isinstance(value, nn.Parameter)
    )


def parameter_count(network: nn.Module) -> int:
    """How many numbers the parameters of a network are."""
    return network.size if isinstance(network, Model) else sum(parameter.numel() for parameter in network.parameters())
