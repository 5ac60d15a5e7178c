"""Fused GEGLU: the product of a gated layer and its gate as one kernel, which writes half and reads nothing again."""

from __future__ import annotations

from torch import nn

from russet.backends.blocks.transformer import OptimizedGEGLU
from russet.backends.gemm_heuristics import gates
from russet.models.transformer import GEGLU
from russet.passes.base import LAYER_BY_LAYER, Changes, Choices, Footprint, Pass, Situation, untouched


def decide(situation: Situation) -> tuple[bool, str]:
    facts, decided = situation.facts, situation.decided
    if not facts.triton:
        return False, "Triton, or a C compiler for it, is not installed"
    if decided["offload"] == "sequential":
        return False, LAYER_BY_LAYER
    if facts.capability < (9, 0):
        return False, "the kernel is fast only on GPUs that load tiles asynchronously (compute capability 9.0 and up)"
    if decided.width("unet") > 2:
        return False, "the kernel is for half precision"
    return True, "half of the matrix product's result is used at once and never written to memory"


def apply(network: nn.Module, name: str, choices: Choices, changes: Changes) -> None:
    from russet.backends.triton.layers import FusedGEGLU, TritonGEGLU  # Triton is installed where the plan chose it

    if name == "unet":
        for module in changes.modules:
            if type(module) in (GEGLU, OptimizedGEGLU, TritonGEGLU) and all(map(untouched, module.children())):
                changes.set_class(module, FusedGEGLU)


def footprint(situation: Situation) -> Footprint:
    return Footprint(walk={"fuses_gate": gates})


PASS = Pass(
    name="fused_geglu",
    meaning="True: one kernel computes a GEGLU layer's matrix product and its gate",
    off=False,
    devices=("cuda",),
    elsewhere="Russet's Triton kernels do not run on this device",
    decide=decide,
    apply=apply,
    footprint=footprint,
)
