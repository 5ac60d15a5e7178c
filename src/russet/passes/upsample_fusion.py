"""Upsample–convolution fusion: a convolution of repeated pixels as one transposed convolution of the small map.

Four ninths of the multiplications are left, and the enlarged map is never made.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from russet.backends.blocks.resnet import OptimizedUpsample
from russet.models.resnet import Upsample2D
from russet.passes.base import Changes, Footprint, Pass, untouched


def decide(situation: Any) -> tuple[bool, str]:
    facts, decided = situation.facts, situation.decided
    if not facts.triton:
        return False, "Triton is not there, or no C compiler for it, which would make the weights"
    if decided["offload"] == "sequential":
        return False, "layers come to the device one by one"
    if max(decided.width("unet"), decided.width("vae")) > 2:
        return False, "in float32 cuDNN is not always quicker with a transposed convolution, and takes more memory"
    return True, "four ninths of the multiplications, and the enlarged map is never made"


def apply(network: nn.Module, name: str, plan: Any, changes: Changes) -> None:
    from russet.backends.triton.layers import TransposedUpsample  # Triton is there where the plan chose it

    if name in ("unet", "vae"):
        for module in network.modules():
            if type(module) in (Upsample2D, OptimizedUpsample) and untouched(module.conv):
                changes.set_class(module, TransposedUpsample)


def footprint(situation: Any) -> Footprint:
    return Footprint(walk={"transposed": situation.decided["upsample_fusion"]})


PASS = Pass(
    name="upsample_fusion",
    meaning="True: large maps are enlarged and convolved by one transposed convolution, with sums of the weights",
    off=False,
    devices=("cuda",),
    elsewhere="there are no kernels of ours for this device",
    decide=decide,
    apply=apply,
    footprint=footprint,
)
