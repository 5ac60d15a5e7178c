"""Weight prepacking on a CPU: weights in bfloat16 are laid out once as its matrix units read them, not in every call.

oneDNN multiplies blocks of weights whose order depends on the CPU, and reorders a plain weight in every call.
"""

from __future__ import annotations

from torch import nn

from russet.backends.cpu.convolution import CpuConv2d
from russet.backends.cpu.linear import OneDNNLinear, OneDNNTokenProjection
from russet.backends.cpu.onednn import PrepackedWeight
from russet.hardware.facts import gigabytes
from russet.models.transformer import TokenProjection
from russet.passes.base import Changes, Choices, Footprint, Pass, Situation, swap_layers

LARGEST_SHARE = 4  # of the budget, for the copies: one fourth


def decide(situation: Situation) -> tuple[bool, str]:
    facts = situation.facts
    if situation.decided.dtype("unet") != "bfloat16" or not (facts.amx and facts.onednn):
        return False, "it pays in bfloat16 on a CPU with AMX"
    size = copied_bytes(situation)
    if size > facts.budget // LARGEST_SHARE:
        return False, f"the copies, {gigabytes(size)}, would be too much"
    return True, f"the matrix units (AMX) read them in blocks; the copies take {gigabytes(size)}"


def apply(network: nn.Module, name: str, choices: Choices, changes: Changes) -> None:
    if name != "unet":  # the others are called once in a run
        return
    layers = {nn.Linear: OneDNNLinear, TokenProjection: OneDNNTokenProjection, nn.Conv2d: CpuConv2d}
    swap_layers(changes.modules, layers, changes)
    changes.copied = True
    for module in changes.modules:
        if type(module) in layers.values():
            changes.set(module, "prepacked", PrepackedWeight())


def copied_bytes(situation: Situation) -> int:
    """The UNet's weights once more."""
    return int(situation.workload.parameters["unet"] * situation.decided.width("unet"))


def footprint(situation: Situation) -> Footprint:
    return Footprint(kept=copied_bytes(situation) if situation.decided["weight_prepacking"] else 0)


PASS = Pass(
    name="weight_prepacking",
    meaning="True: the UNet's weights are laid out once as oneDNN multiplies them, in copies, instead of in every call",
    off=False,
    devices=("cpu",),
    elsewhere="a GPU reads weights as they are",
    decide=decide,
    apply=apply,
    footprint=footprint,
)
