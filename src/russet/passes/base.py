"""What a pass is: one optimisation, which takes a plain network and returns the same network computing it faster.

A pass swaps classes of modules, packs weights and precomputes; its undo restores what was there. It has four parts:
when it pays (``decide``, a pure function with a reason), ``apply``, what it does to memory (``footprint``), and the
plain value ``off``. A module that somebody has replaced, wrapped or hooked is left alone, which is looked at once, when
passes are applied; gradients are computed by the plain ``forward``.
"""

from __future__ import annotations

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
    """What passes have changed in a network, in order, so that it can be undone.

    Attributes:
        modules: the modules that passes may change, each once, as they are when passes are applied: the network and all
            beneath it but what ``torch.compile`` computes.
        blocks_optimized: whether ``optimize_blocks`` has been here.
        copied: whether weights were copied, so that undoing the changes frees memory.
    """

    def __init__(self, network: nn.Module) -> None:
        self.modules = tuple(changeable(network))
        self.blocks_optimized = False
        self.copied = False
        self._undo: list[tuple[nn.Module, str, Any, Any]] = []  # module, attribute, value, value before

    def set_class(self, module: nn.Module, cls: type[nn.Module]) -> None:
        self._undo.append((module, "__class__", cls, module.__class__))
        module.__class__ = cls

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets a plain attribute, which is no parameter, buffer or submodule."""
        self._undo.append((module, name, value, vars(module).get(name, ABSENT)))
        vars(module)[name] = value

    def undo(self) -> None:
        """Restores everything, the latest change first; what somebody else has set since stays."""
        while self._undo:
            module, name, value, before = self._undo.pop()
            if name == "__class__":
                if module.__class__ is value:
                    module.__class__ = before
            elif vars(module).get(name, ABSENT) is value:
                if before is ABSENT:
                    del vars(module)[name]
                else:
                    vars(module)[name] = before


ABSENT = object()


def changeable(network: nn.Module) -> Iterator[nn.Module]:
    """The modules that passes may change; several times faster than ``network.modules()``."""
    seen, left = {network}, [network]
    while left:
        module = left.pop()
        if is_compiled(module):
            continue
        yield module
        for child in reversed(module._modules.values()):
            if child is not None and child not in seen:
                seen.add(child)
                left.append(child)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` computes a module, or one of its methods: it traces plain operations only."""
    own = vars(module)
    if "_orig_mod" in module._modules or own.get("_compiled_call_impl") is not None:
        return True
    return any(hasattr(value, "_torchdynamo_orig_callable") for value in own.values())


def untouched(layer: nn.Module | None) -> bool:
    """Whether a layer is nothing but its weights: of a known class, with no hooks; an absent layer is, too."""
    if layer is None:
        return True
    return type(layer) in OWN and not hooked(layer) and (not isinstance(layer, nn.Conv2d) or is_plain_conv(layer))


def is_plain_conv(conv: nn.Conv2d) -> bool:
    """Whether a convolution is one of the networks': some people set ``padding_mode`` for pictures that tile."""
    return conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros" and conv.bias is not None


def holds_untouched(block: nn.Module) -> bool:
    """Whether no hook watches a block, and its layers are untouched."""
    return not hooked(block) and all(map(untouched, block.children()))


def swap_layers(
    modules: Iterable[nn.Module], classes: Mapping[type[nn.Module], type[nn.Module]], changes: Changes
) -> None:
    """Gives every layer of one class the other class, hooked ones too: their hooks run around the other ``forward``."""
    for module in modules:
        if type(module) in classes:
            changes.set_class(module, classes[type(module)])


class Situation(NamedTuple):
    """What a pass decides on: the machine, the work, what the user asked for, and what was decided before."""

    facts: Facts
    workload: Any
    request: Any
    decided: Any


@dataclass(frozen=True)
class Choices:
    """What was decided for a network, ``choices["ops"]``, and the rows of latents in one call of the UNet."""

    decided: Mapping[str, Any]
    rows: int

    def __getitem__(self, name: str) -> Any:
        return self.decided[name]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a pass does to the memory of a call.

    kept: bytes that are made before the first step and kept to the last. kept_after: those that stay for the next run.
    walk: fields of ``russet.models.footprint.Arithmetic`` that it sets, for the networks of ``components``.
    """

    kept: int = 0
    kept_after: int = 0
    walk: Mapping[str, Any] = field(default_factory=dict)
    components: tuple[str, ...] = ("unet", "vae")


OPTIMIZED_UNET = Footprint(walk={"donates": True}, components=("unet",))
"""Of a pass that needs a UNet's blocks in their optimized form, which donate their buffers."""


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
    """

    name: str
    meaning: str
    off: Any
    devices: tuple[str, ...]
    elsewhere: str
    decide: Callable[[Situation], tuple[Any, str]]
    apply: Callable[[nn.Module, str, Choices, Changes], None] = lambda network, name, choices, changes: None
    footprint: Callable[[Situation], Footprint] = lambda situation: Footprint()
