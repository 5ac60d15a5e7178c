"""Sequential offload: a network whose layers come to the device one at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from russet.residency.weights import submodules


class Streaming:
    """Moves each layer's own parameters to the device just before it computes and drops them after, until ``stop``."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._device = device
        self._resting: dict[nn.Module, dict[str, nn.Parameter]] = {}  # of layers that are at work
        self._buffers = [
            (owner, name, buffer)
            for owner in submodules(network)
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        for owner, name, buffer in self._buffers:
            owner._buffers[name] = buffer.to(device)
        layers = [layer for layer in submodules(network) if own_parameters(layer)]
        self._hooks = [
            hook
            for layer in layers
            for hook in (layer.register_forward_pre_hook(self._arrive), layer.register_forward_hook(self._leave))
        ]
        self._hooks.append(network.register_forward_pre_hook(self._receive))

    def stop(self) -> None:
        """Removes the hooks, and puts back what an error has left on the device."""
        for hook in self._hooks:
            hook.remove()
        for layer, parameters in self._resting.items():
            layer._parameters.update(parameters)
        for owner, name, buffer in self._buffers:
            owner._buffers[name] = buffer

    def _arrive(self, layer: nn.Module, args: Any) -> None:
        self._resting[layer] = own_parameters(layer)
        for name, parameter in self._resting[layer].items():
            layer._parameters[name] = nn.Parameter(parameter.to(self._device), requires_grad=False)

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        layer._parameters.update(self._resting.pop(layer))

    def _receive(self, network: nn.Module, args: Any) -> Any:  # callers send their inputs to where the weights are
        return tuple(arg.to(self._device) if isinstance(arg, Tensor) else arg for arg in args)


def is_streaming(hook: Any) -> bool:
    """Whether a hook is one of these, and not the user's."""
    return isinstance(getattr(hook, "__self__", None), Streaming)


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a layer holds itself, without those of its children."""
    return {name: p for name, p in layer._parameters.items() if p is not None}
