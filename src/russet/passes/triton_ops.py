"""Fused kernels: norms, activations, sums and concatenations of UNet and VAE by Triton, each one pass over memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from russet.backends.blocks.transformer import OptimizedGEGLU
from russet.models.transformer import GEGLU
from russet.passes.base import Changes, Footprint, Pass
from russet.passes.blocks import OPTIMIZED, optimize_blocks


def decide(situation: Any) -> tuple[str, str]:
    if situation.facts.triton:
        return "triton", "each of these operations is limited by memory, and one kernel reads and writes it once"
    return "eager", "Triton is not there, or no C compiler for it"


def apply(network: nn.Module, name: str, plan: Any, changes: Changes) -> None:
    from russet.backends.triton.layers import TritonGEGLU  # Triton is there where the plan chose it
    from russet.backends.triton.ops import TritonOps

    if name not in ("unet", "vae") or plan["offload"] == "sequential":
        return
    optimize_blocks(network, changes)
    ops = TritonOps()
    for module in network.modules():
        if isinstance(module, tuple(OPTIMIZED.values())) and hasattr(module, "ops"):
            changes.set(module, "ops", ops)
        if type(module) in (GEGLU, OptimizedGEGLU):
            changes.set_class(module, TritonGEGLU)


def footprint(situation: Any) -> Footprint:
    used = situation.decided["ops"] == "triton" and situation.decided["offload"] != "sequential"
    return Footprint(walk={"in_place_norms": used})


PASS = Pass(
    name="ops",
    meaning="'eager': PyTorch's own operations; 'triton': norms, activations and sums of UNet and VAE by fused kernels",
    off="eager",
    devices=("cuda",),
    elsewhere="there are no kernels of ours for this device",
    decide=decide,
    apply=apply,
    footprint=footprint,
)
