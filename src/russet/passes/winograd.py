"""Winograd convolutions on a CPU: 3×3 convolutions in float32 with a quarter of the multiplications."""

from __future__ import annotations

from torch import nn

from russet.backends.blocks.resnet import OptimizedUpsample
from russet.backends.cpu.convolution import CpuConv2d, WinogradUpsample
from russet.models.resnet import Upsample2D
from russet.passes.base import Changes, Choices, Footprint, Pass, Situation, modules, swap_layers
from russet.passes.blocks import is_ours


def decide(situation: Situation) -> tuple[bool, str]:
    decided = situation.decided
    if "float32" not in (decided.dtype("unet"), decided.dtype("vae")):
        return False, "in half precision it would change more than the last digits"
    return True, "it needs a quarter of the multiplications, and changes only the last digits of float32"


def apply(network: nn.Module, name: str, choices: Choices, changes: Changes) -> None:
    if name not in ("unet", "vae"):
        return
    swap_layers(modules(network), {nn.Conv2d: CpuConv2d}, changes)
    for module in modules(network):
        if type(module) is CpuConv2d:
            changes.set(module, "by_winograd", True)
        elif type(module) in (Upsample2D, OptimizedUpsample) and is_ours(module):
            changes.set_class(module, WinogradUpsample)


def footprint(situation: Situation) -> Footprint:
    return Footprint(walk={"winograd": situation.decided["winograd"]})


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
