"""Fused GEGLU: the product of a gated layer and its gate as one kernel, which writes half and reads nothing again."""

from __future__ import annotations

from typing import Any

from torch import nn

from russet.backends.blocks.transformer import OptimizedGEGLU
from russet.models.transformer import GEGLU
from russet.passes.base import Changes, Footprint, Pass, untouched


def decide(situation: Any) -> tuple[bool, str]:
    facts, decided = situation.facts, situation.decided
    if not facts.triton:
        return False, "Triton is not there, or no C compiler for it"
    if decided["offload"] == "sequential":
        return False, "layers come to the device one by one"
    if facts.capability < (9, 0):
        return False, "the GPU does not copy whole tiles by itself, which makes the kernel quick"
    if decided.width("unet") > 2:
        return False, "the kernel is for half precision"
    return True, "half of what the product would write, and read again, is never written"


def apply(network: nn.Module, name: str, plan: Any, changes: Changes) -> None:
    from russet.backends.triton.layers import FusedGEGLU, TritonGEGLU  # Triton is there where the plan chose it

    if name == "unet":
        for module in network.modules():
            if type(module) in (GEGLU, OptimizedGEGLU, TritonGEGLU) and untouched(module.proj):
                changes.set_class(module, FusedGEGLU)


def footprint(situation: Any) -> Footprint:
    return Footprint(walk={"fused_geglu": situation.decided["fused_geglu"]})


PASS = Pass(
    name="fused_geglu",
    meaning="True: products of the UNet's gated layers are kernels that gate what they multiply",
    off=False,
    devices=("cuda",),
    elsewhere="there are no kernels of ours for this device",
    decide=decide,
    apply=apply,
    footprint=footprint,
)
