"""The decisions that depend on the machine alone, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping

from russet.hardware.facts import Facts
from russet.hardware.known_bugs import BY_ID, affected
from russet.planning.decisions import Decision, allocator_variables, settled
from russet.planning.plan_types import COMPONENTS, Request
from russet.planning.workload import Sizes

WATERMARK = (1.0, 0.8)


def dtype_decisions(facts: Facts, sizes: Sizes, request: Request) -> list[Decision]:
    """One decision for each component."""
    usual, reason = half_or_full(facts)
    found = []
    for component in COMPONENTS:
        name, value, why = f"dtype.{component}", usual, reason
        if component == "vae" and sizes.vae.float32 and usual == "float16":
            value, why = "float32", "this autoencoder overflows in float16, on every device"
        found.append(settled(request.user, name, value, why, note(facts, request.user.get(name))))
    return found


def half_or_full(facts: Facts) -> tuple[str, str]:
    """The dtype a device computes in by default, and why."""
    if facts.device == "cpu" and facts.bf16:
        # Not by itself: the weights would be rounded as soon as they are read, though they may yet be saved or moved.
        # Measured on a Zen with AVX-512 BF16, one thread, torch 2.13, one guided UNet call of Stable Diffusion 1.5:
        # 10.4 processor seconds against 13.8. The embedded model's pictures stay 45 dB and more from float32's.
        return "float32", "exact; bfloat16, if asked for, takes half the memory and less time on this CPU"
    if facts.device == "cpu":
        return "float32", "CPUs compute float16 slowly"
    if bug := affected(facts, "upsample-half"):
        return "float32", f"on this macOS {bug.what}"
    if facts.device == "mps":
        return "float16", "half the memory of float32; bfloat16 gains nothing on mps"
    return "float16", "half the memory of float32 and the speed of the matrix units"


def note(facts: Facts, dtype: str | None) -> str:
    """What to expect of a dtype that the user chose."""
    if dtype == "bfloat16" and not facts.bf16:
        return "this device does not support bfloat16: expect an error, or slowness"
    if dtype == "bfloat16" and facts.device == "cpu":
        return "your choice; this CPU computes it by itself"
    return "your choice"


def idle_weights(facts: Facts, request: Request) -> Decision:
    if not facts.unified:
        return Decision("idle_weights", "cpu", "the GPU has memory of its own")
    if request.rereadable:
        return Decision("idle_weights", "dropped", "CPU and device share one memory; the checkpoint can be read again")
    return Decision("idle_weights", "kept", "CPU and device share one memory, so moving weights frees nothing")


def machine_decisions(facts: Facts, request: Request) -> list[Decision]:
    """Layout, copies, waits, masks, normalisation, the allocator, priming."""
    return [
        causal_mask(facts),
        contiguity(facts),
        group_norm(facts),
        layer_norm(facts),
        linear_inputs(facts),
        memory_format(facts, request),
        non_blocking(facts),
        looks(facts),
        watermark(facts),
        bucket(facts),
        priming(facts),
    ]


def causal_mask(facts: Facts) -> Decision:
    bug = affected(facts, "causal-leak")
    return Decision("causal_mask", "float", bug.what if bug else "one form that is right on every torch and device")


def contiguity(facts: Facts) -> Decision:
    if bug := affected(facts, "strided-attention"):
        return Decision("contiguous_attention", True, bug.what)
    return Decision("contiguous_attention", False, "attention takes strided operands here")


def group_norm(facts: Facts) -> Decision:
    if bug := affected(facts, "slow-group-norm"):
        return Decision("group_norm", "composed", f"{bug.what}, {bug.consequence}")
    return Decision("group_norm", "native", "torch has a kernel for it here")


def layer_norm(facts: Facts) -> Decision:
    if bug := affected(facts, "half-layer-norm"):
        return Decision("layer_norm", "float32", bug.what)
    return Decision("layer_norm", "native", "torch's own takes every dtype here")


def linear_inputs(facts: Facts) -> Decision:
    if bug := affected(facts, "batched-linear") or affected(facts, "batched-linear-m5"):
        return Decision("linear_inputs", "flat", bug.what)
    return Decision("linear_inputs", "as given", "linear layers take tokens of several rows here")


def memory_format(facts: Facts, request: Request) -> Decision:
    name, bug = "memory_format", affected(facts, "channels-last")
    if bug is None:
        return settled(request.user, name, "channels_last", "convolutions are faster in it")
    asked = f"beware: {bug.what}" if request.memory_format == "channels_last" else "your choice"
    return settled(request.user, name, "contiguous", bug.what, asked)


def non_blocking(facts: Facts) -> Decision:
    if bug := affected(facts, "non-blocking"):
        return Decision("non_blocking", False, bug.what)
    return Decision("non_blocking", facts.device == "cuda", "copies may overlap with work only on CUDA streams")


def looks(facts: Facts) -> Decision:
    """When overflow is looked for. torch has events on mps, which tell how far the device is, from 2.1 on."""
    if facts.device == "cuda":
        return Decision("looks", "one later", "a number is copied to the host while the device works on")
    if facts.device == "mps" and facts.torch >= (2, 1):
        return Decision("looks", "at the end", "to read a number would let the device run dry")
    if facts.device == "mps":
        return Decision("looks", "at once", "this torch cannot tell how far the device is: to read a number has to do")
    return Decision("looks", "at once", "a CPU has computed a number when it is asked for")


def watermark(facts: Facts) -> Decision:
    if bug := affected(facts, "watermark"):
        return Decision("watermark", WATERMARK, bug.what)
    return Decision("watermark", None, "only mps has it")


def environment(device: str) -> Mapping[str, str]:
    """The variables to set before a kind of device is first used: what every plan for it will say.

    torch's allocator reads them as it starts, and to be asked about memory is enough to start it: so they come before
    the facts that a plan is made from.
    """
    return allocator_variables(WATERMARK if device in BY_ID["watermark"].devices else None)


def bucket(facts: Facts) -> Decision:
    if bug := affected(facts, "graph-cache"):
        return Decision("bucket", 64, bug.what)
    return Decision("bucket", 8, "networks need multiples of 8")


def priming(facts: Facts) -> Decision:
    if bug := affected(facts, "first-pass"):
        return Decision("priming", True, bug.what)
    return Decision("priming", False, "the first pass is like all others")
