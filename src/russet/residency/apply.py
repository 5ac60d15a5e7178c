"""Brings a network that is in its place into the form in which it is to compute, and undoes that."""

from __future__ import annotations

from torch import nn

from russet import passes
from russet.backends.module_list import modules, weights
from russet.models.autoencoder import Autoencoder
from russet.models.base import Attending
from russet.passes.base import Changes
from russet.residency.form import MEMORY_FORMATS, Form

CACHE_LINE = 64  # bytes; torch's allocator begins all that it gives at a multiple of this


def applied(network: nn.Module, form: Form, *, compiled: bool = False) -> Changes:
    """Has a network compute in a form, until ``undo``.

    What the user has compiled, or all of it if ``torch.compile`` has wrapped it, computes by its own operations.
    """
    changes = Changes(network)
    if form.attention is not None:
        for module in modules(network, anew=True):
            if isinstance(module, Attending):
                changes.set(module, "attention", form.attention)
    if form.tiling is not None and isinstance(network, Autoencoder):
        changes.set(network, "tiling", form.tiling)
    return changes if compiled else passes.apply(network, form.component, form.choices, changes)


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
    """Gives weights that are about to work their layout and alignment."""
    lay_out(network, form.memory_format)
    if not form.streamed:
        align(network)
