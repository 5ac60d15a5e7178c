"""What a plan says about one network: the form in which it computes, and where it is while it does not.

Pure: a plan decides (``russet.planning``), ``residency.apply`` changes networks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import torch

from russet import passes
from russet.models import attention
from russet.models.attention import AttentionFunction
from russet.models.tiling import Tiling
from russet.passes import malloc
from russet.passes.base import Choices
from russet.planning.memory import unet_rows
from russet.planning.plan import AttentionChoice, Plan
from russet.planning.plan_types import decided_as
from russet.residency.weights import CPU, META

Precision = Literal["attention", "float32"]
"""More precise than planned, once half precision has overflowed: attention in float32, or all of the network."""

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def dtype_named(name: str) -> torch.dtype:
    """``"float16"`` → ``torch.float16``."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float16`` → ``"float16"``."""
    return str(dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How one network computes.

    Attributes:
        component: its name in the pipeline.
        device: where it computes.
        dtype: of weights that are loaded or moved; those that are in place keep theirs.
        precise: whether all of it computes in float32, whatever its weights are kept in.
        streamed: whether each layer's weights are on the device only while the layer computes.
        memory_format: of convolution weights.
        attention: the function that attention layers compute by; None leaves them alone.
        choices: what passes do.
        tiling: tiles of a VAE; None leaves those that the user has set.
        freed_memory: what the C library does with freed memory meanwhile, "kept" or "returned"; None leaves it.
    """

    component: str
    device: torch.device
    dtype: torch.dtype
    precise: bool = False
    streamed: bool = False
    memory_format: str = "contiguous"
    attention: AttentionFunction | None = None
    choices: Choices = dataclasses.field(default_factory=lambda: Choices(passes.OFF, rows=1))
    tiling: Tiling | None = None
    freed_memory: str | None = None


def form_of(component: str, plan: Plan, device: torch.device, precision: Precision | None = None) -> Form:
    """The form in which a plan wants a component to work on a pipeline's device."""
    component = decided_as(component)
    on_cpu = component == "text_encoder" and plan.text_encoder == "cpu"
    chosen = component in ("text_encoder", "unet", "vae")
    tile = plan.vae_tile if component == "vae" else None
    freed = malloc.RULES.get(component) if plan["malloc_tuning"] else None
    streamed = plan.offload == "sequential"
    return Form(
        component=component,
        device=CPU if on_cpu else device,
        dtype=dtype_named(plan.dtype(component)),
        precise=precision == "float32",
        streamed=streamed,
        memory_format=plan.memory_format,
        attention=attention_of(plan, component, upcast=precision is not None) if chosen else None,
        choices=passes.choices(plan, unet_rows(plan.workload, plan)),
        tiling=None if tile is None else Tiling(tile.size, tile.overlap),
        freed_memory=None if streamed else freed,
    )


def attention_of(plan: Plan, component: str, *, upcast: bool = False) -> AttentionFunction:
    """The attention that the plan chose for a component; ``upcast`` insists on float32 scores."""
    choice = plan.precise_attention(component) if upcast else plan.attention(component)
    return attention_function(choice, contiguous=plan["contiguous_attention"])


@functools.lru_cache
def attention_function(choice: AttentionChoice, *, contiguous: bool = False) -> AttentionFunction:
    """An attention as described, inside out: the kind, then float32 scores, then padded heads, then contiguity.

    The same object for the same choice: a CUDA graph of an earlier run is replayed only if nothing is different.
    """
    made: AttentionFunction = attention.fused
    if choice.kind == "sliced":
        made = attention.sliced(choice.rows or 1)
    elif choice.kind == "chunked":
        made = attention.chunked(choice.queries or 1, choice.keys)
    if choice.upcast:
        made = attention.upcast(made)
    if choice.pad:
        made = attention.padded(made, choice.pad)
    return attention.contiguous(made) if contiguous else made


def resting_device(component: str, plan: Plan, device: torch.device) -> torch.device:
    """Where a network is while it does not work; ``meta`` where its weights are dropped and read again when needed."""
    component = decided_as(component)
    if component == "text_encoder" and plan.text_encoder == "cpu":
        return CPU
    if plan.offload == "sequential":
        return CPU
    if plan.offload == "model" or (component == "text_encoder" and plan.text_encoder == "unloaded"):
        return {"cpu": CPU, "disk": META, "device": device}[plan["offload_target"]]
    return device
