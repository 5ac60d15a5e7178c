"""malloc tuning: freed memory is kept for the next operation while the UNet works, and given back afterwards."""

from __future__ import annotations

from russet.passes.base import Pass, Situation

LARGE = 32 * 2**20
"""Bytes of a map from which glibc, by its own rules, gives every freed one back to the system."""


def decide(situation: Situation) -> tuple[bool, str]:
    workload, decided = situation.workload, situation.decided
    if not situation.facts.glibc:
        return False, "only glibc with its default settings is known to gain from it"
    height, width = workload.latents
    rows = workload.rows * min(decided["micro_batch"], workload.images)
    widest = (
        3 * rows * height * width * workload.unet.block_out_channels[0] * decided.width("unet")
    )  # the joined map and its norm
    if widest < LARGE:
        return False, "the feature maps are small enough for glibc to keep them by itself"
    return True, "glibc would return every feature map to the system, which clears the next one's pages each time"


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
