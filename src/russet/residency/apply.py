"""Brings a network that is in its place into the form in which it is to compute, and undoes that.

What was changed is undone where it still is what was set: what a user has put there meanwhile stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from russet.backends.ops import PLAIN, Elementwise
from russet.models.autoencoder import Autoencoder
from russet.models.base import Attending, Model, Stepping
from russet.models.linears import KINDS
from russet.models.modules import modules, weights
from russet.models.norms import ComposedGroupNorm, Float32LayerNorm
from russet.residency.form import MEMORY_FORMATS, Form

CACHE_LINE = 64  # bytes; torch's allocator begins all that it gives at a multiple of this

Change = tuple[nn.Module, str, Any, Any]  # module, attribute, value while applied, value before


class Applied:
    """A form that a network is in, until ``undo``."""

    def __init__(self, network: nn.Module, form: Form) -> None:
        self.form = form
        self._changes = [*changes(network, form)]
        for module, name, value, _ in self._changes:
            _set(module, name, value)
        self._fused = network if form.fused_residuals and isinstance(network, Model) else None
        if self._fused is not None:
            self._fused.lay_sums(form.residual_rows)

    def undo(self) -> None:
        """Gives the network back what it had before."""
        if self._fused is not None:
            self._fused.drop_sums()
        for module, name, value, before in reversed(self._changes):
            now = type(module) if name == "__class__" else module.__dict__.get(name)
            if now is value:
                _set(module, name, before)


def _set(module: nn.Module, name: str, value: Any) -> None:
    if name == "__class__":
        module.__class__ = value
    else:
        module.__dict__[name] = value


def changes(network: nn.Module, form: Form) -> Iterator[Change]:
    """What is to be set in which module. Modules of classes that are not torch's or ours are left alone."""
    compiled = compiled_modules(network)
    usual, gentle = class_changes(form), class_changes(form.for_compiled())
    for module in modules(network, anew=True):
        own = module in compiled
        if wanted := (gentle if own else usual).get(type(module)):
            yield module, "__class__", wanted, type(module)
        if form.attention is not None and isinstance(module, Attending) and module.attention is not form.attention:
            yield module, "attention", form.attention, module.attention
        ops: Elementwise | None = PLAIN if own and form.ops is not None else form.ops
        if ops is not None and isinstance(module, Stepping) and module.steps is not ops:
            yield module, "steps", ops, module.steps
    if form.tiling is not None and isinstance(network, Autoencoder):
        yield network, "tiling", form.tiling, network.tiling


def class_changes(form: Form) -> dict[type[nn.Module], type[nn.Module]]:
    """Class → the class that computes the same in the form's way."""
    wanted: dict[type[nn.Module], type[nn.Module]] = dict(zip(KINDS["native"], KINDS[form.linears], strict=True))
    if form.composed_groups:
        wanted[nn.GroupNorm] = ComposedGroupNorm
    if form.float32_layers:
        wanted[nn.LayerNorm] = Float32LayerNorm
    return {cls: new for cls, new in wanted.items() if new is not cls}


def compiled_modules(network: nn.Module) -> set[nn.Module]:
    """Modules that the user has compiled, with all beneath: the compiler traces plain operations only."""
    found: set[nn.Module] = set()
    if any(hasattr(value, "_torchdynamo_orig_callable") for value in network.__dict__.values()):  # decode, forward
        found.update(network.modules())
    for module in modules(network):
        if module not in found and (
            hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        ):
            found.update(module.modules())
    return found


def is_compiled(network: nn.Module) -> bool:
    """Whether a network as a whole was compiled by the user."""
    return network in compiled_modules(network)


def lay_out(network: nn.Module, memory_format: str) -> None:
    """Puts the weights of all convolutions in a memory format; other parameters have only one."""
    wanted = MEMORY_FORMATS[memory_format]
    for child in modules(network):
        if isinstance(child, nn.Conv2d) and not child.weight.is_contiguous(memory_format=wanted):
            child.weight.data = child.weight.data.contiguous(memory_format=wanted)


def align(network: nn.Module) -> None:
    """Copies weights on the CPU that do not begin at a cache line in a mapped file to memory that does.

    The CPU's kernels round a little differently there, so that the same weights would give another picture out of
    another file.
    """
    for value in weights(network):
        begins = value.storage_offset() == 0  # others are parts of what is packed
        if value.device.type == "cpu" and begins and value.data_ptr() % CACHE_LINE:
            value.data = value.data.clone()


def arrange_weights(network: nn.Module, form: Form) -> None:
    """Gives weights that are about to work their layout and alignment, and packs those that the form wants packed."""
    lay_out(network, form.memory_format)
    if form.streamed:
        return
    align(network)
    if isinstance(network, Model) and form.packed:
        with torch.no_grad():
            network.lay_together()
