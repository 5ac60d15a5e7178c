"""Shared prefix: guidance asks about the same latents with two texts, so what comes before the first text is one row.

The UNet's first convolution, its first residual block and its first self-attention do not see the text. Computed once,
they serve both halves of classifier-free guidance.
"""

from __future__ import annotations

from torch import nn

from russet.backends.blocks.unet import OptimizedUNet
from russet.passes.base import OPTIMIZED_UNET, Changes, Choices, Pass, Situation
from russet.passes.blocks import optimize_blocks


def decide(situation: Situation) -> tuple[bool, str]:
    if situation.workload.rows < 2:
        return False, "there is one text for each picture"
    if situation.workload.unet.conditioned_per_row:
        return (
            False,
            "this network adds conditions of each row (a class, or SDXL's pooled prompt and sizes)",
        )
    return True, "what comes before the first layer that attends to the text is the same for both halves of guidance"


def apply(network: nn.Module, name: str, choices: Choices, changes: Changes) -> None:
    if name == "unet":
        optimize_blocks(network, changes)
        if isinstance(network, OptimizedUNet):
            changes.set(network, "shares_prefix", True)


PASS = Pass(
    name="shared_prefix",
    meaning="True: what the UNet computes before the first layer that attends to the text is computed once for both"
    " halves of guidance",
    off=False,
    devices=("cpu", "mps", "cuda"),
    elsewhere="",
    decide=decide,
    apply=apply,
    footprint=lambda situation: OPTIMIZED_UNET,
)
