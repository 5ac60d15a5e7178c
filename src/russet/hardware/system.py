"""Questions to the operating system. Each answers with something plain, and with "nothing" where it does not apply."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from pathlib import Path

PYTHON_AND_TORCH = 400 * 2**20  # bytes that the two take by themselves


def process_memory() -> int:
    """Bytes of memory that this process holds beyond what Python and torch take by themselves: weights, mostly."""
    import psutil

    return max(0, int(psutil.Process().memory_info().rss) - PYTHON_AND_TORCH)


def on_macos() -> bool:
    return platform.system() == "Darwin"


@functools.cache
def sysctl(name: str) -> str:
    """One value of macOS's sysctl; empty elsewhere, and where the name is unknown."""
    if not on_macos():
        return ""
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def within_container(total: int, available: int) -> tuple[int, int]:
    """Total and available memory, lowered to what a Linux container (cgroup v2) allows itself."""
    if on_macos():
        return total, available
    limit, used = (read_text(f"/sys/fs/cgroup/memory.{part}") for part in ("max", "current"))
    if not (limit.isdigit() and used.isdigit()):
        return total, available
    return min(total, int(limit)), max(0, min(available, int(limit) - int(used)))


@functools.cache
def cpu_name() -> str:
    named = sysctl("machdep.cpu.brand_string") or re.search(r"model name\s*:\s*(.+)", read_text("/proc/cpuinfo"))
    if isinstance(named, re.Match):
        return named.group(1).strip()
    return named or platform.processor() or platform.machine()


def cpu_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself (x86's AMX or AVX-512 BF16)."""
    return not cpu_flags().isdisjoint(("amx_bf16", "avx512_bf16"))


def cpu_amx() -> bool:
    """Whether this CPU has matrix units for bfloat16 (x86's AMX) that oneDNN may use."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "AMX")).upper()
    return {"amx_bf16", "amx_tile"} <= cpu_flags() and ("AMX" in allowed or allowed in ("DEFAULT", "ALL"))


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets that Linux reports for the first processor; empty on other systems."""
    found = re.search(r"^flags\s*:(.*)$", read_text("/proc/cpuinfo"), re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def glibc_decides() -> bool:
    """Whether freed memory is glibc's to give back, and nobody has told it how."""
    try:
        named = os.confstr("CS_GNU_LIBC_VERSION") if hasattr(os, "confstr") else None
    except ValueError:  # another C library
        named = None
    told = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return bool(named) and not told and "LD_PRELOAD" not in os.environ


def read_text(path: str) -> str:
    """A small file's text; empty where it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
