"""Tiny UNets shaped like each family of checkpoints, and one call of them in the form that a plan asks for."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch

from russet.models.base import Model
from russet.models.unet import UNet2DConditionModel
from russet.passes.prompt_cache import cached_prompt
from russet.passes.timestep_embeddings import TimestepCache
from russet.planning.plan import Plan
from russet.residency import network as residency
from russet.residency import runs

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
TINY = {
    "block_out_channels": (16, 32),
    "down_block_types": (CROSS_DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", CROSS_UP),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "sample_size": 8,
}
SIZES_AND_TEXT = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
FAMILIES = {
    "SD 1": TINY,
    "SD 2": {**TINY, "use_linear_projection": True, "attention_head_dim": (2, 4)},
    "SD 2.1 with scores that overflow": {**TINY, "use_linear_projection": True, "upcast_attention": True},
    "SDXL": {
        **TINY,
        **SIZES_AND_TEXT,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", CROSS_DOWN),
        "up_block_types": (CROSS_UP, "UpBlock2D"),
        "projection_class_embeddings_input_dim": 6 * 8 + 10,
    },
    "SDXL refiner": {
        **TINY,
        **SIZES_AND_TEXT,
        "use_linear_projection": True,
        "transformer_layers_per_block": 2,
        "projection_class_embeddings_input_dim": 5 * 8 + 10,
    },
    "LCM": {**TINY, "time_cond_proj_dim": 12},
    "inpainting": {**TINY, "in_channels": 9},
    "with classes": {**TINY, "num_class_embeds": 5},
    "without a middle": {**TINY, "mid_block_type": None},
    "attention to the text alone": {**TINY, "only_cross_attention": True},
    "no attention at all": {**TINY, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    | {"mid_block_type": "UNetMidBlock2D"},
}
VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def conditions(unet: UNet2DConditionModel, rows: int, device: str | torch.device = "cpu") -> dict[str, Any]:
    """What this family's UNet takes besides the text, [rows, …]."""
    made: dict[str, Any] = {}
    if unet.config.addition_embed_type:
        ids = (unet.config.projection_class_embeddings_input_dim - 10) // 8
        made["added_cond_kwargs"] = {"text_embeds": torch.ones(rows, 10, device=device)} | {
            "time_ids": torch.ones(rows, ids, device=device)
        }
    if unet.config.num_class_embeds:
        made["class_labels"] = torch.arange(rows, device=device)
    if unet.config.time_cond_proj_dim:
        made["timestep_cond"] = torch.ones(rows, unet.config.time_cond_proj_dim, device=device)
    return made


def replanned(plan: Plan, **changes: Any) -> Plan:
    """The plan with some of its decisions made otherwise."""
    decisions = tuple(dataclasses.replace(one, value=changes.get(one.name, one.value)) for one in plan.decisions)
    return dataclasses.replace(plan, decisions=decisions)


def in_form(found: Plan, network: Model, component: str = "unet") -> contextlib.AbstractContextManager[Any]:
    """``with in_form(plan, unet): …``: the network computes as the plan wants it, where it is."""
    use = residency.Use(component, found, network.device, None)
    return runs.OnDevice(residency.of(network), use)


def answer(found: Plan, unet: Any, sample: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """One call of a UNet that is in the plan's form, as the denoiser makes it."""
    text = cached_prompt(unet, context, found["prompt_cache"])
    given, time = conditions(unet, len(sample), sample.device), 500.0
    if found["timestep_embeddings"] == "precomputed":
        cond = given.pop("timestep_cond", None)
        known = TimestepCache(unet, [time], None if cond is None else cond[:1])(time)
        return unet(sample, known, text, **given).sample
    return unet(sample, time, text, **given).sample


def carried_out(found: Plan, unet: UNet2DConditionModel, sample: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """One call of the network in the form that the plan asks for, where the network is."""
    with in_form(found, unet), torch.no_grad():
        return answer(found, unet, sample, context)
