"""The optimisations, each a pass of one file: delete a file and its line here, and Russet is slower and right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from russet.passes import (
    buffer_donation,
    cuda_graphs,
    fused_geglu,
    malloc,
    onednn,
    packed_projections,
    prompt_cache,
    residual_fusion,
    shared_prefix,
    timestep_embeddings,
    triton_ops,
    upsample_fusion,
    weight_prepacking,
    winograd,
    workarounds,
)
from russet.passes.base import Changes, Choices, Pass

PASSES: tuple[Pass, ...] = (
    buffer_donation.PASS,
    shared_prefix.PASS,
    onednn.PASS,
    weight_prepacking.PASS,
    winograd.PASS,
    malloc.PASS,
    triton_ops.PASS,
    fused_geglu.PASS,
    upsample_fusion.PASS,
    packed_projections.PASS,
    residual_fusion.PASS,
    timestep_embeddings.PASS,
    prompt_cache.PASS,
    cuda_graphs.PASS,
)
"""In the order in which they are decided and applied: each may read what was decided before it."""


OFF: Mapping[str, Any] = {**workarounds.OFF, **{one.name: one.off for one in PASSES}}
"""All passes and workarounds off: the plain network."""


def choices(plan: Any, rows: int) -> Choices:
    """What a plan decided for passes and workarounds; ``rows``: of latents in one call of the UNet."""
    return Choices({name: plan[name] for name in (*OFF, "offload")}, rows)


def apply(network: nn.Module, name: str, choices: Choices, changes: Changes | None = None) -> Changes:
    """Changes the network of a component as was decided; ``undo()`` of what is returned restores it exactly.

    changes: those that were made before, to be undone together.
    """
    changes = Changes(network) if changes is None else changes
    try:
        with torch.inference_mode(False), torch.no_grad():  # weights that are laid anew can still be trained
            workarounds.apply(network, choices, changes)
            for one in PASSES:
                if choices[one.name] != one.off:
                    one.apply(network, name, choices, changes)
    except BaseException:
        changes.undo()
        raise
    return changes
