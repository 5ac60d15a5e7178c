"""What a pass is: one optimisation, which takes a plain network and returns the same network computing it faster.

A pass swaps classes of modules, packs weights and precomputes; its undo restores what was there. It has four parts:
when it pays (``decide``, a pure function with a reason), ``apply``, what it does to memory (``footprint``), and the
plain value ``off``. A module that somebody has replaced, wrapped or hooked is left alone, which is looked at once, when
passes are applied; gradients are computed by the plain ``forward``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from russet.backends.cpu.convolution import CpuConv2d
from russet.backends.cpu.linear import OneDNNLinear, OneDNNTokenProjection
from russet.backends.layers import (
    ComposedGroupNorm,
    FlatLinear,
    FlatTokenProjection,
    Float32LayerNorm,
    PairedLinear,
)
from russet.backends.ops import hooked
from russet.hardware.facts import Facts
from russet.models.transformer import TokenProjection

OWN = {
    nn.GroupNorm,
    ComposedGroupNorm,
    nn.LayerNorm,
    Float32LayerNorm,
    nn.Linear,
    FlatLinear,
    OneDNNLinear,
    PairedLinear,
    nn.Conv2d,
    CpuConv2d,
    TokenProjection,
    FlatTokenProjection,
    OneDNNTokenProjection,
}
"""Classes of layers that are nothing but their weights."""


LAYER_BY_LAYER = "with sequential offload, layers are on the device one at a time"


class Changes:
    """What passes have changed in a network, in order, so that it can be undone."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def set_class(self, module: nn.Module, cls: type[nn.Module]) -> None:
        before = module.__class__
        module.__class__ = cls
        self._undo.append(lambda: setattr(module, "__class__", before))

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets a plain attribute, which is no parameter, buffer or submodule."""
        attributes = vars(module)
        if name in attributes:
            before = attributes[name]
            self._undo.append(lambda: attributes.__setitem__(name, before))
        else:
            self._undo.append(lambda: attributes.pop(name, None))
        attributes[name] = value

    def undo(self) -> None:
        """Restores everything, the latest change first."""
        while self._undo:
            self._undo.pop()()


def untouched(layer: nn.Module | None) -> bool:
    """Whether a layer is nothing but its weights: of a known class, with no hooks; an absent layer is, too."""
    if layer is None:
        return True
    return type(layer) in OWN and not hooked(layer) and (not isinstance(layer, nn.Conv2d) or is_plain_conv(layer))


def is_plain_conv(conv: nn.Conv2d) -> bool:
    """Whether a convolution is one of the networks': some people set ``padding_mode`` for pictures that tile."""
    return conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros" and conv.bias is not None


def all_untouched(layers: Iterable[nn.Module | None]) -> bool:
    return all(untouched(layer) for layer in layers)


def swap_layers(
    modules: Iterable[nn.Module], classes: Mapping[type[nn.Module], type[nn.Module]], changes: Changes
) -> None:
    """Gives every layer of one class the other class, hooked ones too: their hooks run around the other ``forward``."""
    for module in [m for m in modules if type(m) in classes]:
        changes.set_class(module, classes[type(module)])


def modules(network: nn.Module) -> Iterator[nn.Module]:
    """The modules that passes may change: not those that ``torch.compile`` computes, nor what is beneath them."""
    seen: set[nn.Module] = set()
    waiting = [network]
    while waiting:
        module = waiting.pop()
        if module in seen or is_compiled(module):
            continue
        seen.add(module)
        yield module
        waiting.extend(reversed([*module.children()]))


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` made a module, or ``module.compile()`` was called."""
    return "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None


class Situation(NamedTuple):
    """What a pass decides on: the machine, the work, what the user asked for, and what was decided before."""

    facts: Facts
    workload: Any
    request: Any
    decided: Any


@dataclass(frozen=True)
class Choices:
    """What was decided for a network, ``choices["ops"]``, and the rows of latents in one call of the UNet."""

    decided: Any  # a plan, or a mapping
    rows: int

    def __getitem__(self, name: str) -> Any:
        return self.decided[name]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a pass does to the memory of a call.

    kept: bytes that are made before the first step and kept to the last. walk: fields of ``Arithmetic`` that it sets.
    """

    kept: int = 0
    walk: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One optimisation.

    Attributes:
        name: of its decision in the plan.
        meaning: what the values of that decision mean.
        off: the value for which nothing is done, as ``disable_fast_paths()`` asks for.
        devices: where ``decide`` is asked; elsewhere it is off because of ``elsewhere``.
        decide: from a situation to a value and the reason for it.
        apply: changes a component's network, ``name`` in the pipeline, as was decided.
        footprint: what it does to memory, for a situation in which its value is decided.
        computing: a context to compute in, by the component's name.
    """

    name: str
    meaning: str
    off: Any
    devices: tuple[str, ...]
    elsewhere: str
    decide: Callable[[Situation], tuple[Any, str]]
    apply: Callable[[nn.Module, str, Choices, Changes], None] = lambda network, name, choices, changes: None
    footprint: Callable[[Situation], Footprint] = lambda situation: Footprint()
    computing: Callable[[str], contextlib.AbstractContextManager[None]] | None = None
