"""The decisions that depend on the device alone, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from russet.hardware.facts import Facts
from russet.hardware.known_bugs import BY_ID, affected
from russet.planning.plan_types import COMPONENTS, Decision, Request, resolve
from russet.planning.workload import Workload

WATERMARK = {"PYTORCH_MPS_HIGH_WATERMARK_RATIO": "1.0", "PYTORCH_MPS_LOW_WATERMARK_RATIO": "0.8"}


def dtype_decisions(facts: Facts, workload: Workload, request: Request) -> list[Decision]:
    """One decision for each component."""
    usual, reason = default_dtype(facts)
    found = []
    for component in COMPONENTS:
        name, value, why = f"dtype.{component}", usual, reason
        if component == "vae" and workload.vae_overflows and usual == "float16":
            value, why = "float32", "this VAE overflows in float16, on every device"
        found.append(resolve(request.user, name, value, why, dtype_note(facts, request.user.get(name))))
    return found


def default_dtype(facts: Facts) -> tuple[str, str]:
    """The dtype a device computes in by default, and why."""
    if facts.device == "cpu" and facts.amx:
        return "bfloat16", "this CPU's matrix units (AMX) compute it several times faster than float32, which is exact"
    if facts.device == "cpu" and facts.bf16:
        # Not by default: without matrix units it saves a quarter of the time, and every weight is rounded.
        return "float32", "it is exact; bfloat16, if requested, takes half the memory and less time on this CPU"
    if facts.device == "cpu":
        return "float32", "CPUs compute float16 slowly"
    if bug := affected(facts, "upsample-half"):
        return "float32", f"on this macOS {bug.what}"
    if facts.device == "mps":
        return "float16", "it takes half the memory of float32; bfloat16 is no faster on mps"
    return "float16", "it takes half the memory of float32 and runs on the GPU's matrix units"


def dtype_note(facts: Facts, dtype: str | None) -> str:
    """What to expect of a dtype that the user chose."""
    if dtype == "bfloat16" and not facts.bf16:
        return "this device does not support bfloat16: expect an error or slow work"
    if dtype == "bfloat16" and facts.device == "cpu":
        return "your choice; this CPU has instructions for it"
    return "your choice"


def offload_target(facts: Facts, request: Request) -> Decision:
    if not facts.unified:
        return Decision("offload_target", "cpu", "the GPU has its own memory")
    if request.reloadable:
        return Decision(
            "offload_target",
            "disk",
            "CPU and GPU share one memory, and the weights can be read from the checkpoint again",
        )
    return Decision("offload_target", "device", "CPU and GPU share one memory, so moving weights frees nothing")


DEFECTS: tuple[tuple[str, tuple[str, ...], tuple[Any, str], tuple[Any, str]], ...] = (
    (
        "contiguous_attention",
        ("strided-attention",),
        (True, "in this PyTorch {bug.what}"),
        (False, "attention accepts strided tensors here"),
    ),
    (
        "group_norm",
        ("slow-group-norm",),
        ("composed", "in this PyTorch {bug.what}, {bug.consequence}"),
        ("native", "PyTorch has a kernel for it here"),
    ),
    (
        "layer_norm",
        ("half-layer-norm",),
        ("float32", "in this PyTorch {bug.what}"),
        ("native", "PyTorch's kernel takes every dtype here"),
    ),
    (
        "flatten_linear_inputs",
        ("batched-linear", "batched-linear-m5"),
        (True, "in this PyTorch {bug.what}"),
        (False, "linear layers compute batches correctly here"),
    ),
    (
        "duplicate_single_rows",
        ("dropped-bias",),
        (True, "on this macOS {bug.what}"),
        (False, "linear layers compute single vectors correctly here"),
    ),
    (
        "float32_gelu",
        ("half-gelu",),
        (True, "in this PyTorch {bug.what}"),
        (False, "PyTorch's kernel takes every dtype here"),
    ),
    (
        "size_multiple",
        ("graph-cache",),
        (64, "{bug.what}"),
        (8, "the networks need multiples of 8"),
    ),
    (
        "warm_up",
        ("first-pass",),
        (True, "in this PyTorch {bug.what}"),
        (False, "the first step is computed like all others"),
    ),
)
"""Decisions that known defects alone make: name, defects, value and reason with one of them, and without."""


def machine_decisions(facts: Facts, request: Request) -> list[Decision]:
    """Layouts, normalisation, checks for overflow, picture sizes, and the warm-up."""
    found = [memory_format(facts, request), finite_checks(facts)]
    for name, bug_ids, (value, reason), without in DEFECTS:
        bug = next(filter(None, (affected(facts, bug_id) for bug_id in bug_ids)), None)
        found.append(Decision(name, *without) if bug is None else Decision(name, value, reason.format(bug=bug)))
    return found


def memory_format(facts: Facts, request: Request) -> Decision:
    name, bug = "memory_format", affected(facts, "channels-last")
    if bug is None:
        return resolve(request.user, name, "channels_last", "convolutions are faster in this layout")
    warned = f"beware: {bug.what}" if request.memory_format == "channels_last" else "your choice"
    return resolve(request.user, name, "contiguous", bug.what, warned)


def finite_checks(facts: Facts) -> Decision:
    """When the CPU reads whether values were finite. torch has events on mps from 2.1 on, which limit the queue."""
    if facts.device == "cuda":
        return Decision("finite_checks", "deferred", "the result is copied to the CPU while the GPU works on")
    if facts.device == "mps" and facts.torch >= (2, 1):
        return Decision("finite_checks", "at the end", "reading a value earlier would leave the GPU without work")
    if facts.device == "mps":
        return Decision("finite_checks", "immediate", "this PyTorch has no events that would tell how far the GPU is")
    return Decision("finite_checks", "immediate", "on a CPU, reading a value does not wait for anything")


def allocator_environment(device: str) -> Mapping[str, str]:
    """The environment variables to set before a kind of device is first used.

    torch's allocator reads them when it starts, and asking it how much memory there is starts it. So they are set
    before the facts are read that a plan is made from, and are no part of the plan.
    """
    return WATERMARK if device in BY_ID["watermark"].devices else {}
