"""Fused kernels: norms, activations, sums and concatenations of UNet and VAE by Triton, each one pass over memory."""

from __future__ import annotations

from torch import nn

from russet.backends import norm_heuristics
from russet.backends.blocks.transformer import OptimizedGEGLU
from russet.models.transformer import GEGLU
from russet.passes.base import Changes, Choices, Footprint, Pass, Situation
from russet.passes.blocks import OPTIMIZED, optimize_blocks


def decide(situation: Situation) -> tuple[str, str]:
    if situation.facts.triton:
        return "triton", "memory limits norms and activations, and a fused kernel reads and writes each value once"
    return "eager", "Triton, or a C compiler for it, is not installed"


def apply(network: nn.Module, name: str, choices: Choices, changes: Changes) -> None:
    from russet.backends.triton.layers import TritonGEGLU  # Triton is installed where the plan chose it
    from russet.backends.triton.ops import TRITON

    if name not in ("unet", "vae") or choices["offload"] == "sequential":
        return
    optimize_blocks(network, changes)
    for module in changes.modules:
        if isinstance(module, tuple(OPTIMIZED.values())) and hasattr(module, "ops"):
            changes.set(module, "ops", TRITON)
        if type(module) in (GEGLU, OptimizedGEGLU):
            changes.set_class(module, TritonGEGLU)


def footprint(situation: Situation) -> Footprint:
    if situation.decided["offload"] == "sequential":  # layers that come and go are not fused
        return Footprint()
    return Footprint(walk={"donates": True, "in_place_norms": True, "channel_sums": norm_heuristics.sums})


PASS = Pass(
    name="ops",
    meaning="'eager': norms, activations and sums of UNet and VAE are PyTorch's operations; 'triton': fused kernels",
    off="eager",
    devices=("cuda",),
    elsewhere="Russet's Triton kernels do not run on this device",
    decide=decide,
    apply=apply,
    footprint=footprint,
)
