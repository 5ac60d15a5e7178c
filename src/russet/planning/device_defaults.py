"""The decisions that depend on the device alone, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping

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
    if facts.device == "cpu" and facts.bf16:
        # Not by default: the weights would be rounded as soon as they are read, though they may yet be saved or moved.
        # Measured on a Zen with AVX-512 BF16, one thread, torch 2.13, one guided UNet call of Stable Diffusion 1.5:
        # 10.4 processor seconds against 13.8. The embedded model's pictures stay 45 dB and more from float32's.
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


def machine_decisions(facts: Facts, request: Request) -> list[Decision]:
    """Layouts, normalisation, checks for overflow, picture sizes, and the warm-up."""
    return [
        contiguous_attention(facts),
        group_norm(facts),
        layer_norm(facts),
        flatten_linear_inputs(facts),
        memory_format(facts, request),
        finite_checks(facts),
        size_multiple(facts),
        warm_up(facts),
    ]


def contiguous_attention(facts: Facts) -> Decision:
    if bug := affected(facts, "strided-attention"):
        return Decision("contiguous_attention", True, f"in this PyTorch {bug.what}")
    return Decision("contiguous_attention", False, "attention accepts strided tensors here")


def group_norm(facts: Facts) -> Decision:
    if bug := affected(facts, "slow-group-norm"):
        return Decision("group_norm", "composed", f"in this PyTorch {bug.what}, {bug.consequence}")
    return Decision("group_norm", "native", "PyTorch has a kernel for it here")


def layer_norm(facts: Facts) -> Decision:
    if bug := affected(facts, "half-layer-norm"):
        return Decision("layer_norm", "float32", f"in this PyTorch {bug.what}")
    return Decision("layer_norm", "native", "PyTorch's kernel takes every dtype here")


def flatten_linear_inputs(facts: Facts) -> Decision:
    if bug := affected(facts, "batched-linear") or affected(facts, "batched-linear-m5"):
        return Decision("flatten_linear_inputs", True, f"in this PyTorch {bug.what}")
    return Decision("flatten_linear_inputs", False, "linear layers compute batches correctly here")


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


def size_multiple(facts: Facts) -> Decision:
    if bug := affected(facts, "graph-cache"):
        return Decision("size_multiple", 64, bug.what)
    return Decision("size_multiple", 8, "the networks need multiples of 8")


def warm_up(facts: Facts) -> Decision:
    if bug := affected(facts, "first-pass"):
        return Decision("warm_up", True, f"in this PyTorch {bug.what}")
    return Decision("warm_up", False, "the first step is computed like all others")
