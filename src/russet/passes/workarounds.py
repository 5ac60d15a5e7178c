"""Layers computed in another way because a device computes them wrongly or slowly: rows of the table of known bugs.

These are no optimisations: they hold with ``disable_fast_paths()`` too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn import functional as F

from russet.backends.layers import (
    ComposedGroupNorm,
    FlatLinear,
    FlatTokenProjection,
    Float32GEGLU,
    Float32LayerNorm,
    PairedLinear,
    float32_gelu,
)
from russet.backends.norm_heuristics import at_once
from russet.backends.ops import hooked
from russet.models.embeddings import TimestepEmbedding
from russet.models.resnet import ResnetBlock2D
from russet.models.transformer import GEGLU, TokenProjection
from russet.passes.base import Changes, Choices, swap_layers

OFF: Mapping[str, Any] = {
    "group_norm": "native",
    "layer_norm": "native",
    "duplicate_single_rows": False,
    "flatten_linear_inputs": False,
    "float32_gelu": False,
}


def norm_workspace(decided: Any) -> Callable[[int], int] | None:
    """Bytes that a composed norm of so many numbers takes: two float32 maps, of a large map one; None for others."""
    if decided["group_norm"] != "composed":
        return None
    return lambda numbers: (8 if at_once(numbers) else 4) * numbers


def apply(network: nn.Module, choices: Choices, changes: Changes) -> None:
    """Swaps what the plan's decisions on layers ask for."""
    if choices["group_norm"] == "composed":
        swap_layers(changes.modules, {nn.GroupNorm: ComposedGroupNorm}, changes)
    if choices["layer_norm"] == "float32":
        swap_layers(changes.modules, {nn.LayerNorm: Float32LayerNorm}, changes)
    if choices["duplicate_single_rows"]:
        pair(changes)
    if choices["flatten_linear_inputs"]:
        swap_layers(changes.modules, {nn.Linear: FlatLinear, TokenProjection: FlatTokenProjection}, changes)
    if choices["float32_gelu"]:
        swap_layers(changes.modules, {GEGLU: Float32GEGLU}, changes)
        for module in changes.modules:
            if vars(module).get("act") is F.gelu:
                changes.set(module, "act", float32_gelu)


def pair(changes: Changes) -> None:
    """Linear layers that can see a single vector: those of the time."""
    for module in changes.modules:
        if isinstance(module, (TimestepEmbedding, ResnetBlock2D)):
            for layer in module.children():
                if type(layer) is nn.Linear and not hooked(layer):
                    changes.set_class(layer, PairedLinear)
