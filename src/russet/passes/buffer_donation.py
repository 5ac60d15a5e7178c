"""Buffer donation: sums and activations in place, and maps freed as soon as the last operation has read them.

A plain residual block holds its input, a norm and its activation at once; in place it holds two of them. On the way up
the joined map is the widest of all, and nothing needs it once it is convolved.
"""

from __future__ import annotations

from torch import nn

from russet.passes.base import Changes, Choices, Footprint, Pass, Situation
from russet.passes.blocks import optimize_blocks

LARGE = 2**20
"""Bytes of the UNet's first map from which memory matters more than the few microseconds that the bookkeeping takes."""


def decide(situation: Situation) -> tuple[bool, str]:
    workload, decided = situation.workload, situation.decided
    rows = workload.rows * min(decided["micro_batch"], workload.images)
    height, width = workload.latents
    if rows * height * width * workload.unet.block_out_channels[0] * decided.width("unet") < LARGE:
        return False, "the maps are small"
    return True, "a map is free as soon as the last operation has read it"


def apply(network: nn.Module, name: str, choices: Choices, changes: Changes) -> None:
    optimize_blocks(network, changes)


PASS = Pass(
    name="buffer_donation",
    meaning="True: sums and activations of UNet and VAE are in place, and maps are freed as soon as they are read",
    off=False,
    devices=("cpu", "mps", "cuda"),
    elsewhere="",
    decide=decide,
    apply=apply,
    footprint=lambda situation: Footprint(walk={"donates": True}),
)
