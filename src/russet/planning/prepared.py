"""Bytes of what denoising makes before its first step and keeps to its end: of the text, of the times, of weights."""

from __future__ import annotations

from russet.backends.gemm_heuristics import ONES, PADDED, REPEATED
from russet.planning.decisions import Decisions
from russet.planning.plan_types import TEXT, AttentionChoice
from russet.planning.workload import Sizes

TOLD = 50  # times that are told at once; Stable Diffusion 1.5's take 2 MB in half precision


def made_before(sizes: Sizes, found: Decisions, rows: int) -> int:
    """All of it, for ``rows`` rows in a call of the UNet."""
    kept = {"kept": text_key_bytes, "kept together": text_key_bytes, "absorbed": absorbed_bytes}.get(found["text_keys"])
    total = 0 if kept is None else kept(sizes, found)
    if found["times"] == "ahead":
        total += told_bytes(sizes, found)
    if found["residual_sums"] == "in products, with copies":
        total += copied_bytes(sizes, found, rows, found.attention("unet"))
    return total


def text_key_bytes(sizes: Sizes, found: Decisions) -> int:
    """What the keys and values of all prompts take, in all layers."""
    features = sum(width * depth for _, width, depth in sizes.unet.transformers)
    return sizes.images * sizes.rows * TEXT * 2 * features * found.width("unet")


def absorbed_bytes(sizes: Sizes, found: Decisions) -> int:
    """What the weights of all layers take with all prompts multiplied into them."""
    features = sum(width * depth * sizes.unet.heads[level] for level, width, depth in sizes.unet.transformers)
    return sizes.images * sizes.rows * TEXT * 2 * features * found.width("unet")


def told_bytes(sizes: Sizes, found: Decisions) -> int:
    """What times that are told at once come to: an embedding, and a number for each channel of each residual block."""
    outputs = sum(sizes.unet.channels[level] for level, _, _ in sizes.unet.blocks)
    return TOLD * (4 * sizes.unet.channels[0] + outputs) * found.width("unet")


def copied_bytes(sizes: Sizes, found: Decisions, rows: int, attention: AttentionChoice | None = None) -> int:
    """What copies of weights take: of self-attention's output with its bias, of heads padded, of shortcuts repeated."""
    u, number = sizes.unet, found.width("unet")
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
