"""The decisions that depend on the machine alone, each with its reason."""

from __future__ import annotations

from russet.devices.bugs import affected
from russet.devices.choices import COMPONENTS, Decision, Request
from russet.devices.facts import Facts
from russet.devices.sizes import Sizes

WATERMARK = (1.0, 0.8)


def dtype_decisions(facts: Facts, sizes: Sizes, request: Request) -> list[Decision]:
    """One decision for each component."""
    usual, reason = half_or_full(facts)
    found = []
    for component in COMPONENTS:
        name = f"dtype.{component}"
        if name in request.user:
            found.append(Decision(name, *checked_dtype(facts, request.user[name]), by="user"))
        elif component == "vae" and sizes.vae.float32 and usual == "float16":
            found.append(Decision(name, "float32", "this autoencoder overflows in float16, on every device"))
        else:
            found.append(Decision(name, usual, reason))
    return found


def half_or_full(facts: Facts) -> tuple[str, str]:
    """The dtype a device computes in by default, and why."""
    if facts.device == "cpu":
        return "float32", "CPUs compute float16 slowly"
    for bug_id in ("upsample-half", "half-layer-norm"):
        if bug := affected(facts, bug_id):
            return "float32", f"on this machine {bug.what[0].lower()}{bug.what[1:]}"
    if facts.device == "mps":
        return "float16", "half the memory of float32; bfloat16 gains nothing on mps"
    return "float16", "half the memory of float32 and the speed of the matrix units"


def checked_dtype(facts: Facts, dtype: str) -> tuple[str, str]:
    """The user's dtype with a note on what to expect of it."""
    if dtype == "bfloat16" and not facts.bf16:
        return dtype, "this device does not support bfloat16: expect an error"
    return dtype, "dtype was given"


def machine_decisions(facts: Facts, request: Request) -> list[Decision]:
    """Layout, copies, masks, normalisation, the allocator, priming."""
    return [
        causal_mask(facts),
        contiguity(facts),
        group_norm(facts),
        memory_format(facts, request),
        non_blocking(facts),
        watermark(facts),
        bucket(facts),
        priming(facts),
    ]


def causal_mask(facts: Facts) -> Decision:
    reason = "one form that is right on every torch and device"
    if bug := affected(facts, "causal-leak"):
        reason = f"{bug.what}"
    return Decision("causal_mask", "float", reason)


def contiguity(facts: Facts) -> Decision:
    if bug := affected(facts, "strided-attention"):
        return Decision("contiguous_attention", True, bug.what)
    return Decision("contiguous_attention", False, "attention takes strided operands here")


def group_norm(facts: Facts) -> Decision:
    if bug := affected(facts, "slow-group-norm"):
        return Decision("group_norm", "composite", f"{bug.what}, {bug.consequence}")
    return Decision("group_norm", "native", "torch has a kernel for it here")


def memory_format(facts: Facts, request: Request) -> Decision:
    if asked := request.user.get("memory_format"):
        bug = affected(facts, "channels-last") if asked == "channels_last" else None
        return Decision("memory_format", asked, bug.what if bug else "memory_format was given", by="user")
    if bug := affected(facts, "channels-last"):
        return Decision("memory_format", "contiguous", bug.what)
    return Decision("memory_format", "channels_last", "convolutions are faster in it")


def non_blocking(facts: Facts) -> Decision:
    if bug := affected(facts, "non-blocking"):
        return Decision("non_blocking", False, bug.what)
    return Decision("non_blocking", facts.device == "cuda", "copies may overlap with work only on CUDA streams")


def watermark(facts: Facts) -> Decision:
    if bug := affected(facts, "watermark"):
        return Decision("watermark", WATERMARK, bug.what)
    return Decision("watermark", None, "only mps has it")


def bucket(facts: Facts) -> Decision:
    if bug := affected(facts, "graph-cache"):
        return Decision("bucket", 64, bug.what)
    return Decision("bucket", 8, "networks need multiples of 8")


def priming(facts: Facts) -> Decision:
    if bug := affected(facts, "first-pass"):
        return Decision("priming", True, bug.what)
    return Decision("priming", False, "the first pass is like all others")
