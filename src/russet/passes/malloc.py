"""malloc tuning: freed memory is kept for the next operation while the UNet works, and given back afterwards."""

from __future__ import annotations

from typing import Any

from russet.passes.base import Pass, Situation

LARGE = 32 * 2**20
"""Bytes of a map from which glibc, by its own rules, gives every freed one back to the system."""


def decide(situation: Situation) -> tuple[bool, str]:
    workload, decided = situation.workload, situation.decided
    if not situation.facts.glibc:
        return False, "only glibc with its default settings is known to gain from it"
    rows = workload.rows * min(decided["micro_batch"], workload.images)
    if rows * largest_map(workload) * decided.width("unet") < LARGE:
        return False, "the feature maps are small enough for glibc to keep them by itself"
    return True, "glibc would return every feature map to the system, which clears the next one's pages each time"


def largest_map(workload: Any) -> int:
    """Numbers in the largest tensor of a row: a joined map, or the product of a gated layer."""
    height, width = workload.latents
    sizes = [
        -(-height // (1 << stage.level)) * -(-width // (1 << stage.level))
        * max(stage.inputs, 8 * stage.channels if stage.depth else 0)
        for stage in workload.unet.stages
    ]  # fmt: skip
    return int(max(sizes))


RULES = {"unet": "kept", "vae": "returned"}
"""What is done with freed memory while a component computes: the VAE's maps are larger, and are given back at once."""


PASS = Pass(
    name="malloc_tuning",
    meaning="True: while the UNet works, the C library keeps freed memory for the next operation",
    off=False,
    devices=("cpu",),
    elsewhere="the device's memory has an allocator of its own",
    decide=decide,
)
