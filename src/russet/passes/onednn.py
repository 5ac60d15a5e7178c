"""Linear layers by oneDNN, and convolutions that are products: on x86 PyTorch takes another library's for float32."""

from __future__ import annotations

from torch import nn

from russet.backends.cpu.convolution import CpuConv2d
from russet.backends.cpu.linear import OneDNNLinear, OneDNNTokenProjection
from russet.models.transformer import TokenProjection
from russet.passes.base import Changes, Choices, Pass, Situation, swap_layers

X86 = ("x86_64", "AMD64")  # as Python names it on Linux and Windows


def decide(situation: Situation) -> tuple[bool, str]:
    if situation.facts.onednn and situation.facts.machine in X86:
        return True, "oneDNN's matrix products are the fastest on this CPU"
    return False, "PyTorch chooses the library for linear layers here"


def apply(network: nn.Module, name: str, choices: Choices, changes: Changes) -> None:
    swap_layers(changes.modules, {nn.Linear: OneDNNLinear, TokenProjection: OneDNNTokenProjection}, changes)
    if name in ("unet", "vae"):
        swap_layers(changes.modules, {nn.Conv2d: CpuConv2d}, changes)
        for module in changes.modules:
            if type(module) is CpuConv2d:
                changes.set(module, "by_onednn", True)


PASS = Pass(
    name="onednn_linear",
    meaning="True: linear layers of all networks call oneDNN directly",
    off=False,
    devices=("cpu",),
    elsewhere="PyTorch chooses the library for linear layers here",
    decide=decide,
    apply=apply,
)
