"""Layers computed in another way because a device computes them wrongly or slowly: rows of the table of known bugs.

These are no optimisations: they hold with ``disable_fast_paths()`` too.
"""

from __future__ import annotations

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
from russet.models.embeddings import TimestepEmbedding
from russet.models.resnet import ResnetBlock2D
from russet.models.transformer import GEGLU, TokenProjection
from russet.passes.base import Changes, swap_layers


def apply(network: nn.Module, plan: Any, changes: Changes) -> None:
    """Swaps what the plan's decisions on layers ask for."""
    if plan["group_norm"] == "composed":
        swap_layers(network, {nn.GroupNorm: ComposedGroupNorm}, changes)
    if plan["layer_norm"] == "float32":
        swap_layers(network, {nn.LayerNorm: Float32LayerNorm}, changes)
    if plan["single_rows"] == "paired":
        pair(network, changes)
    if plan["linear_inputs"] == "flat":
        swap_layers(network, {nn.Linear: FlatLinear, TokenProjection: FlatTokenProjection}, changes)
    if plan["gelu"] == "float32":
        swap_layers(network, {GEGLU: Float32GEGLU}, changes)
        for module in network.modules():
            if vars(module).get("act") is F.gelu:
                changes.set(module, "act", float32_gelu)


def pair(network: nn.Module, changes: Changes) -> None:
    """Linear layers that can see a single vector: those of the time."""
    for module in network.modules():
        if isinstance(module, (TimestepEmbedding, ResnetBlock2D)):
            for layer in module.children():
                if type(layer) is nn.Linear:
                    changes.set_class(layer, PairedLinear)
