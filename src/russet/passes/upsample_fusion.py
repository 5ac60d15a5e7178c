"""Upsample–convolution fusion: a convolution of repeated pixels as one transposed convolution of the small map.

Four ninths of the multiplications are left, and the enlarged map is never made.
"""

from __future__ import annotations

from torch import nn

from russet.backends import upsample_heuristics
from russet.backends.blocks.resnet import OptimizedUpsample
from russet.models.resnet import Upsample2D
from russet.passes.base import LAYER_BY_LAYER, Changes, Choices, Footprint, Pass, Situation, holds_untouched


def decide(situation: Situation) -> tuple[bool, str]:
    facts, decided = situation.facts, situation.decided
    if not facts.triton:
        return False, "Triton, or a C compiler for it, is not installed"
    if decided["offload"] == "sequential":
        return False, LAYER_BY_LAYER
    if max(decided.width("unet"), decided.width("vae")) > 2:
        return False, "in float32 a transposed convolution of cuDNN is not always faster, and takes more memory"
    return True, "it needs four ninths of the multiplications, and the upsampled map is never written to memory"


def apply(network: nn.Module, name: str, choices: Choices, changes: Changes) -> None:
    from russet.backends.triton.layers import TransposedUpsample  # Triton is installed where the plan chose it

    if name in ("unet", "vae"):
        for module in changes.modules:
            if type(module) in (Upsample2D, OptimizedUpsample) and holds_untouched(module):
                changes.set_class(module, TransposedUpsample)


def workspace(rows: int, inputs: int, outputs: int, height: int, width: int) -> int | None:
    """Numbers that the transposed convolution takes beside its input and result; None where it is not used."""
    if not upsample_heuristics.pays(rows, inputs, outputs, height, width):
        return None
    return upsample_heuristics.room(inputs, outputs)


def footprint(situation: Situation) -> Footprint:
    return Footprint(walk={"upsample_workspace": workspace})


PASS = Pass(
    name="upsample_fusion",
    meaning="True: nearest-neighbour upsampling and the 3×3 convolution after it are one transposed convolution for"
    " large feature maps",
    off=False,
    devices=("cuda",),
    elsewhere="Russet's Triton kernels do not run on this device",
    decide=decide,
    apply=apply,
    footprint=footprint,
)
