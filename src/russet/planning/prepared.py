"""Bytes of what denoising precomputes and keeps to its end: the prompt cache, timestep embeddings, copied weights."""

from __future__ import annotations

from russet.backends.gemm_heuristics import ONES, PADDED, REPEATED
from russet.planning.plan_types import TEXT, AttentionChoice, Decisions
from russet.planning.workload import Workload

PRECOMPUTED = 50  # timesteps that are computed together; Stable Diffusion 1.5's take 2 MB in half precision


def precomputed_bytes(workload: Workload, found: Decisions, rows: int) -> int:
    """All of it, for ``rows`` rows in a call of the UNet."""
    total = prompt_cache_bytes(workload, found)
    if found["timestep_embeddings"] == "precomputed":
        total += timestep_embedding_bytes(workload, found)
    if found["residual_fusion"] == "with weight copies":
        total += weight_copy_bytes(workload, found, rows, found.attention("unet"))
    return total


def prompt_cache_bytes(workload: Workload, found: Decisions) -> int:
    """What the prompt cache takes in the form that was decided."""
    if found["prompt_cache"] == "off":
        return 0
    folded = found["prompt_cache"] == "folded into weights"
    return folded_bytes(workload, found) if folded else prompt_kv_bytes(workload, found)


def prompt_kv_bytes(workload: Workload, found: Decisions) -> int:
    """What the keys and values of all prompts take, in all layers."""
    features = sum(width * depth for _, width, depth in workload.unet.transformers)
    return workload.images * workload.rows * TEXT * 2 * features * found.width("unet")


def folded_bytes(workload: Workload, found: Decisions) -> int:
    """What the projections of all cross-attention layers take with the prompts' keys and values folded into them."""
    features = sum(width * depth * workload.unet.heads[level] for level, width, depth in workload.unet.transformers)
    return workload.images * workload.rows * TEXT * 2 * features * found.width("unet")


def timestep_embedding_bytes(workload: Workload, found: Decisions) -> int:
    """What precomputed timestep embeddings take: one each, and its projection for every residual block."""
    outputs = sum(workload.unet.channels[level] for level, _, _ in workload.unet.blocks)
    return PRECOMPUTED * (4 * workload.unet.channels[0] + outputs) * found.width("unet")


def weight_copy_bytes(workload: Workload, found: Decisions, rows: int, attention: AttentionChoice | None = None) -> int:
    """What copies of weights take: of self-attention's output with its bias, of heads padded, of shortcuts repeated."""
    u, number = workload.unet, found.width("unet")
    total = 0
    for level, width, depth in u.transformers:
        dim = width // u.heads[level]
        wide = next((size for size in (attention.pad if attention else ()) if size >= dim), dim)
        inward = 3 * width // dim * wide * width * number
        padded = wide > dim and inward <= PADDED
        outward = (width // dim * (wide if padded else dim) + ONES) * width * number
        total += depth * (outward + (inward if padded else 0))
    for level, inputs, _ in u.blocks:
        repeated = rows * inputs * u.channels[level] * number
        total += repeated if inputs != u.channels[level] and repeated <= REPEATED else 0
    return total
