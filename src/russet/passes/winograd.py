"""Winograd convolutions on a CPU: 3×3 convolutions in float32 with a quarter of the multiplications."""

from __future__ import annotations

from torch import nn

from russet.backends.blocks.resnet import OptimizedUpsample
from russet.backends.cpu import winograd_heuristics
from russet.backends.cpu.convolution import CpuConv2d, WinogradUpsample
from russet.models.resnet import Upsample2D
from russet.passes.base import Changes, Choices, Footprint, Pass, Situation, holds_untouched, swap_layers


def decide(situation: Situation) -> tuple[bool, str]:
    decided = situation.decided
    if "float32" not in (decided.dtype("unet"), decided.dtype("vae")):
        return False, "in half precision it would change more than the last digits"
    return True, "it needs a quarter of the multiplications, and changes only the last digits of float32"


def apply(network: nn.Module, name: str, choices: Choices, changes: Changes) -> None:
    if name not in ("unet", "vae"):
        return
    swap_layers(changes.modules, {nn.Conv2d: CpuConv2d}, changes)
    for module in changes.modules:
        if type(module) is CpuConv2d:
            changes.set(module, "by_winograd", True)
        elif type(module) in (Upsample2D, OptimizedUpsample) and holds_untouched(module):
            changes.set_class(module, WinogradUpsample)


def workspace(rows: int, inputs: int, outputs: int, height: int, width: int, enlarged: bool) -> int | None:
    """Numbers that a convolution takes beside its input and result; None where it is computed directly."""
    if not winograd_heuristics.pays(rows, inputs, outputs, height, width):
        return None
    return winograd_heuristics.room(rows, inputs, outputs, height, width, doubled=enlarged).size


def footprint(situation: Situation) -> Footprint:
    return Footprint(walk={"conv_workspace": workspace})


PASS = Pass(
    name="winograd",
    meaning="True: 3×3 convolutions of UNet and VAE in float32 use Winograd's algorithm where it is faster",
    off=False,
    devices=("cpu",),
    elsewhere="a GPU multiplies faster than it would transform feature maps",
    decide=decide,
    apply=apply,
    footprint=footprint,
)
