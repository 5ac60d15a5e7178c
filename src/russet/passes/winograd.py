"""Winograd convolutions on a CPU: 3×3 convolutions in float32 with a quarter of the multiplications."""

from __future__ import annotations

from typing import Any

from torch import nn

from russet.backends.blocks.resnet import OptimizedUpsample
from russet.backends.cpu.convolution import CpuConv2d, WinogradUpsample
from russet.backends.ops import hooked
from russet.models.resnet import Upsample2D
from russet.passes.base import Changes, Footprint, Pass, swap_layers, untouched


def decide(situation: Any) -> tuple[str, str]:
    decided = situation.decided
    if "float32" not in (decided.dtype("unet"), decided.dtype("vae")):
        return "direct", "in half precision more than the last digits would change"
    return "winograd", "a quarter of the multiplications; only the last digits of float32 change"


def apply(network: nn.Module, name: str, plan: Any, changes: Changes) -> None:
    if name not in ("unet", "vae"):
        return
    swap_layers(network, {nn.Conv2d: CpuConv2d}, changes)
    for module in network.modules():
        if type(module) is CpuConv2d:
            changes.set(module, "by_winograd", True)
        elif type(module) in (Upsample2D, OptimizedUpsample) and not hooked(module) and untouched(module.conv):
            changes.set_class(module, WinogradUpsample)


def footprint(situation: Any) -> Footprint:
    return Footprint(walk={"winograd": situation.decided["convolutions"] == "winograd"})


PASS = Pass(
    name="convolutions",
    meaning="'direct', or 'winograd': those of 3×3 in UNet and VAE with fewer multiplications",
    off="direct",
    devices=("cpu",),
    elsewhere="a GPU multiplies faster than it would bring maps to and fro",
    decide=decide,
    apply=apply,
    footprint=footprint,
)
