"""What is prepared for a device before networks compute: kernels, and what its allocator reads."""

from __future__ import annotations

import os

import torch

from russet.planning.device_defaults import allocator_environment
from russet.planning.plan import Plan


def compile_kernels(plan: Plan, device: torch.device) -> None:
    """Starts to compile kernels of ours while weights are moved and read."""
    if plan["ops"] == "triton":
        from russet.backends.triton import warmup  # Triton is installed where the plan chose it

        for dtype in {plan.dtype("unet"), plan.dtype("vae")}:
            warmup.prepare(
                device,
                getattr(torch, dtype),
                fused_geglu=plan["fused_geglu"],
                upsample_fusion=plan["upsample_fusion"],
            )


def set_environment(device: torch.device) -> None:
    """Sets the variables that a device's allocator reads when it starts, unless the user has set any of them.

    One of the user's and one of ours could contradict each other, which ends in an error when the device starts.
    """
    variables = allocator_environment(device.type)
    if not variables.keys() & os.environ.keys():
        os.environ.update(variables)
