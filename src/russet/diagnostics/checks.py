"""The requirements, one function each: what was found, whether it will do, and what to do if not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from russet.hardware.facts import GIB, Facts, Version, gigabytes, why_no_mps
from russet.hardware.host_environment import HostEnvironment
from russet.hardware.known_bugs import affected

MACOS_FOR_TORCH: tuple[tuple[Version, Version], ...] = (  # (from this torch on, this macOS is needed)
    ((2, 15), (15,)),
    ((2, 9), (14,)),
    ((2, 6), (13,)),
    ((1, 13), (12, 3)),
)
OLDEST_TORCH, FLASH_TORCH = (1, 13), (2, 13)
OLDEST_PYTHON = (3, 10)
LEAST_MEMORY = 8 * GIB
LEAST_AVAILABLE = 3 * 10**9  # half-precision Stable Diffusion 1.5 at work
MUCH_SWAP = GIB
SMALL_MODEL, LARGE_MODEL = 3 * 10**9, 15 * 10**9  # bytes on disk: one small model; a large one and some room

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """One requirement: its ``name``, what was ``found``, and ``advice`` unless all is well."""

    name: str
    status: Status
    found: str
    advice: str = ""


def all_checks(facts: Facts, host: HostEnvironment) -> Iterator[Check]:
    """Every requirement that applies to the machine."""
    yield device(facts)
    if facts.system == "macOS":
        yield macos(facts)
        yield mps(facts)
    yield python(facts)
    yield torch(facts)
    yield memory(facts)
    yield available(facts)
    yield swap(facts)
    yield disk(host)
    yield login(host)
    yield from variables(host)


def dotted(version: Version) -> str:
    return ".".join(map(str, version))


def device(facts: Facts) -> Check:
    found = f"{facts.chip} ({facts.device})"
    if facts.device == "cpu":
        return Check("device", "warning", found, "no GPU is used: pictures take minutes instead of seconds")
    return Check("device", "ok", found)


def macos(facts: Facts) -> Check:
    needed = next((macos for first, macos in MACOS_FOR_TORCH if facts.torch >= first), MACOS_FOR_TORCH[-1][1])
    if facts.macos < needed:
        advice = (
            f"torch {dotted(facts.torch)} needs macOS {dotted(needed)} for mps: update macOS, or install an older torch"
        )
        return Check("macOS", "problem", dotted(facts.macos), advice)
    for bug_id, update in (("macos-13.2", "macOS"), ("upsample-half", "macOS"), ("macos-27-sdxl", "torch")):
        if bug := affected(facts, bug_id):
            return Check("macOS", "warning", dotted(facts.macos), f"{bug.what}: {bug.consequence}; update {update}")
    return Check("macOS", "ok", dotted(facts.macos))


def mps(facts: Facts) -> Check:
    if facts.mps_available:
        return Check("mps", "ok", "built and available")
    common = {name: getattr(facts, name) for name in ("system", "rosetta", "machine", "mps_built")}
    return Check("mps", "problem", "built, not available" if facts.mps_built else "not built", why_no_mps(common))


def python(facts: Facts) -> Check:
    found = f"{dotted(facts.python)} ({facts.machine}{', under Rosetta' if facts.rosetta else ''})"
    if facts.rosetta or (facts.system == "macOS" and facts.machine != "arm64"):
        advice = "install an arm64 Python (python.org, Homebrew in /opt/homebrew, or Miniforge) and torch into it"
        return Check("Python", "problem", found, advice)
    needed = (3, 11) if facts.torch >= (2, 15) else OLDEST_PYTHON
    if facts.python < needed:
        return Check("Python", "problem", found, f"torch {dotted(facts.torch)} and Russet need {dotted(needed)}")
    return Check("Python", "ok", found)


def torch(facts: Facts) -> Check:
    found = dotted(facts.torch)
    if facts.torch < OLDEST_TORCH:
        return Check("PyTorch", "problem", found, f"Russet needs {dotted(OLDEST_TORCH)}: pip install --upgrade torch")
    if facts.device == "mps" and facts.torch < FLASH_TORCH:
        advice = f"{dotted(FLASH_TORCH)} has fast attention and norms for mps: pip install --upgrade torch"
        return Check("PyTorch", "warning", found, advice)
    return Check("PyTorch", "ok", found)


def memory(facts: Facts) -> Check:
    found = gigabytes(facts.memory)
    if facts.memory < LEAST_MEMORY and facts.device != "cuda":
        return Check(
            "memory", "warning", found, "8 GB is the least that is comfortable; take small pictures and models"
        )
    return Check("memory", "ok", found)


def available(facts: Facts) -> Check:
    found = gigabytes(facts.available)
    if facts.available + facts.held < LEAST_AVAILABLE:
        advice = f"a picture takes about {gigabytes(LEAST_AVAILABLE)}: close other programs, a browser first"
        return Check("memory available", "warning", found, advice)
    return Check("memory available", "ok", found)


def swap(facts: Facts) -> Check:
    found = gigabytes(facts.swap_used) + " in use"
    if facts.swap_used > MUCH_SWAP:
        return Check("swap", "warning", found, "memory is short already: close other programs, or restart the computer")
    return Check("swap", "ok", found)


def disk(host: HostEnvironment) -> Check:
    found = f"{gigabytes(host.disk_free)} free for {host.cache}"
    if host.disk_free < SMALL_MODEL:
        return Check("disk", "problem", found, "a model takes 3 GB and more: free some, or set HF_HOME to another disk")
    if host.disk_free < LARGE_MODEL:
        return Check("disk", "warning", found, "enough for a small model; a large one takes 7 to 14 GB")
    return Check("disk", "ok", found)


def login(host: HostEnvironment) -> Check:
    if host.logged_in:
        return Check("Hugging Face Hub", "ok", "logged in")
    return Check("Hugging Face Hub", "ok", "not logged in", "only gated and private models need it: `hf auth login`")


def variables(host: HostEnvironment) -> Iterator[Check]:
    """Those environment variables that do harm."""
    harm = {
        ("PYTORCH_ENABLE_MPS_FALLBACK", "1"): "operations go to the CPU silently; Russet needs none of that: unset it",
        ("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.0"): "memory has no limit and may hang the whole Mac: unset it",
        ("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0"): "memory has no limit and may hang the whole Mac: unset it",
        ("PYTORCH_MPS_FAST_MATH", "1"): "results are less exact than Russet expects: unset it",
        ("PYTORCH_MPS_DISABLE_PREFILL_ATTENTION", "1"): "attention builds whole score matrices: unset it",
    }
    for name, value in host.variables.items():
        if advice := harm.get((name, value)):
            yield Check(name, "warning", value, advice)
