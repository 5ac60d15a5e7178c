"""The operations between matrix products that a plan chose, their kernels, and what a device's allocator reads."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import torch

from russet.backends.cpu.ops import OnCPU
from russet.backends.ops import PLAIN, Elementwise
from russet.models.activations import silu
from russet.planning.device_defaults import allocator_environment
from russet.planning.plan import Plan

if TYPE_CHECKING:
    from russet.backends.triton.ops import Fused
    from russet.backends.triton.warmup import KernelsAhead


def ops_of(plan: Plan) -> Elementwise:
    """The operations between the matrix products as the plan wants them."""
    if plan["ops"] == "triton":
        return fused_ops(plan["fused_geglu"], plan["upsample_fusion"])
    winograd, onednn = plan["winograd"], plan["onednn_linear"]
    return cpu_ops(winograd, onednn) if winograd or onednn else PLAIN


def compile_kernels(plan: Plan, device: torch.device) -> None:
    """Starts to compile kernels of ours while weights are moved and read."""
    if plan["ops"] == "triton":
        for dtype in {plan.dtype("unet"), plan.dtype("vae")}:
            kernels(plan["fused_geglu"], plan["upsample_fusion"]).prepare(device, getattr(torch, dtype))


@functools.cache
def cpu_ops(by_winograd: bool, by_onednn: bool) -> OnCPU:
    return OnCPU(by_winograd=by_winograd, by_onednn=by_onednn)


@functools.cache
def fused_ops(fused_geglu: bool, transposed: bool) -> Fused:
    from russet.backends.triton.ops import Fused  # Triton is there where the plan chose it

    return Fused(silu, fused_geglu, transposed, kernels(fused_geglu, transposed).failed)


@functools.cache
def kernels(fused_geglu: bool, transposed: bool) -> KernelsAhead:
    from russet.backends.triton.warmup import KernelsAhead

    return KernelsAhead(fused_geglu, transposed)


def set_environment(device: torch.device) -> None:
    """Sets the variables that a device's allocator reads when it starts, unless the user has set any of them.

    One of the user's and one of ours could contradict each other, which ends in an error when the device starts.
    """
    variables = allocator_environment(device.type)
    if not variables.keys() & os.environ.keys():
        os.environ.update(variables)
