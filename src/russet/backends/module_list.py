"""What a network consists of, listed once a call: a walk through a UNet takes a millisecond, and a call looks at its
modules and weights a dozen times.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def modules(network: nn.Module, *, anew: bool = False) -> tuple[nn.Module, ...]:
    """The network and every module beneath it, as they were when they were last listed ``anew``.

    Pipelines list them anew as a call begins. Each comes once, before those that it holds.
    """
    below: tuple[nn.Module, ...] | None = network.__dict__.get("_listed")
    if anew or below is None:  # without the network itself, which would keep itself alive
        below = network.__dict__["_listed"] = tuple(network.modules())[1:]
    return (network, *below)


def weights(network: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer beneath; one that two modules hold comes twice."""
    for module in modules(network):
        for value in (*module._parameters.values(), *module._buffers.values()):
            if value is not None:
                yield value


def places(network: nn.Module) -> tuple[int, ...]:
    """Where in memory each parameter and buffer lies: elsewhere than before, once any was moved or replaced."""
    return tuple(value.data_ptr() for value in weights(network))
