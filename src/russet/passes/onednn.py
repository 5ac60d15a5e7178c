"""Linear layers by oneDNN, and convolutions that are products: on x86 PyTorch takes another library's for float32."""

from __future__ import annotations

from typing import Any

from torch import nn

from russet.backends.cpu.convolution import CpuConv2d
from russet.backends.cpu.linear import OneDNNLinear, OneDNNTokenProjection
from russet.models.transformer import TokenProjection
from russet.passes.base import Changes, Pass, swap_layers

X86 = ("x86_64", "AMD64")  # as Python names it on Linux and Windows


def decide(situation: Any) -> tuple[str, str]:
    if situation.facts.onednn and situation.facts.machine in X86:
        return "onednn", "its float32 products are the fastest here"
    return "native", "PyTorch's choice is the best known here"


def apply(network: nn.Module, name: str, plan: Any, changes: Changes) -> None:
    swap_layers(network, {nn.Linear: OneDNNLinear, TokenProjection: OneDNNTokenProjection}, changes)
    if name in ("unet", "vae"):
        swap_layers(network, {nn.Conv2d: CpuConv2d}, changes)
        for module in network.modules():
            if type(module) is CpuConv2d:
                changes.set(module, "by_onednn", True)


PASS = Pass(
    name="linear_layers",
    meaning="'native': by the library that PyTorch takes; 'onednn': by oneDNN, in every network",
    off="native",
    devices=("cpu",),
    elsewhere="PyTorch's choice is the best known here",
    decide=decide,
    apply=apply,
)
