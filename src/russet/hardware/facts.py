"""What this machine is, as plain data: a plan is made from these facts alone, so any Mac can be planned for anywhere.

``read_facts`` reads the real machine; ``mac`` describes a Mac in a few words:

    mac("M1", memory_gib=8, macos="14.5", torch="2.13.0")
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from russet.errors import DeviceError, InputError

if TYPE_CHECKING:
    import torch

Version = tuple[int, ...]

GIB = 2**30
PYTHON_AND_TORCH = 400 * 2**20  # bytes of memory that the two take without any weights


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One device and the machine around it. Sizes are bytes; a version is a tuple, empty where it does not apply.

    ``memory`` is all memory of the device: the unified memory of a Mac, a GPU's own, a computer's RAM. ``available`` is
    free now, without swapping other programs out; ``held`` is what this process uses of it already (weights, cached
    blocks), which a plan may use again. On ``mps`` the ``working_set`` is Metal's recommended limit for the GPU, and
    ``largest_buffer`` the limit for one tensor.
    """

    device: str  # "mps", "cuda" or "cpu"
    chip: str
    memory: int
    available: int
    torch: Version
    held: int = 0
    working_set: int = 0  # 0: no smaller than the memory
    largest_buffer: int = 0  # 0: no limit of its own
    cores: int = 1
    swap_used: int = 0
    ram: int = 0
    system: str = ""  # "macOS", "Linux", "Windows"
    macos: Version = ()
    machine: str = ""  # the Python's architecture: "arm64", "x86_64"
    rosetta: bool = False
    python: Version = ()
    mps_built: bool = False
    mps_available: bool = False
    cuda: Version = ()
    capability: Version = ()
    bf16: bool = False
    amx: bool = False  # whether a CPU has matrix units for bfloat16 that torch uses (x86's AMX)
    triton: bool = False  # whether kernels can be compiled for the device
    glibc: bool = False  # whether glibc's malloc with its default settings frees memory
    onednn: bool = False  # whether torch has oneDNN's operator for linear layers

    @property
    def chip_family(self) -> str:
        """``"M2"`` of an ``"Apple M2 Pro"``; empty for a chip that is not Apple's."""
        found = re.search(r"\bM(\d+)\b", self.chip)
        return found.group(0) if found and self.device == "mps" else ""

    @property
    def unified(self) -> bool:
        """Whether CPU and device share one memory, so that moving weights between them frees none."""
        return self.device != "cuda"

    @property
    def limit(self) -> int:
        """Bytes that must never be exceeded: beyond, the device fails or the whole machine swaps."""
        if self.device == "mps":
            return min(self.working_set or self.memory, self.memory)
        if self.system == "macOS":  # which compresses and swaps memory before anything fails
            return max(self.budget, int(self.memory * 0.9))
        return self.budget

    @property
    def budget(self) -> int:
        """Bytes to stay within: those free now or held already, less a margin for what is not counted."""
        margin = 0.8 if self.device == "mps" else 0.92  # a Mac's other programs need more now and then
        free = int((self.available + self.held) * margin)
        return min(free, self.limit) if self.device == "mps" else free


def parse_version(text: str) -> Version:
    """The numbers a version starts with: ``"2.13.0+cu130"`` is (2, 13, 0), ``"14.5"`` is (14, 5).

    Raises:
        InputError: the text does not start with a number.
    """
    found = re.match(r"\d+(?:\.\d+)*", text.strip())
    if not found:
        raise InputError(f"a version starts with a number, like 2.13.0; this does not: {text!r}")
    return tuple(int(part) for part in found.group(0).split("."))


def mac(
    chip: str,
    *,
    memory_gib: float,
    macos: str = "15.0",
    torch: str = "2.13.0",
    available_gib: float | None = None,
    swap_gib: float = 0.0,
) -> Facts:
    """A Mac with Apple silicon, written down: ``chip`` is ``"M1"``, ``"M2 Pro"``, …; ``available_gib`` defaults to what
    macOS and a browser (4.5 GiB together) leave, and never less than 1 GiB.

    Metal's limits follow from the memory as on real Macs: the recommended working set is two thirds of it up to
    32 GB, three quarters above, and one buffer takes three quarters of the working set.

    Raises:
        InputError: an unknown chip name, a version that is none, or no memory.
    """
    if not re.fullmatch(r"(Apple )?M\d+( (Pro|Max|Ultra))?", chip):
        raise InputError(f"a Mac's chip is called like 'M1' or 'M2 Pro', not {chip!r}")
    if not memory_gib > 0:
        raise InputError(f"memory_gib must be above 0, not {memory_gib!r}")
    memory = int(memory_gib * GIB)
    available = max(1.0, memory_gib - 4.5) if available_gib is None else available_gib
    working_set = apple_working_set(memory)
    system, version = parse_version(macos), parse_version(torch)
    return Facts(
        device="mps",
        chip=chip if chip.startswith("Apple ") else f"Apple {chip}",
        memory=memory,
        available=int(available * GIB),
        working_set=working_set,
        largest_buffer=apple_largest_buffer(working_set),
        cores=8,
        swap_used=int(swap_gib * GIB),
        ram=memory,
        system="macOS",
        macos=system,
        machine="arm64",
        python=(3, 11),
        torch=version,
        mps_built=True,
        mps_available=True,
        bf16=apple_bf16(version, system),
    )


def apple_working_set(memory: int) -> int:
    """Metal's ``recommendedMaxWorkingSetSize`` as Macs report it: 5461 MiB of 8 GiB, 21845 of 32, 49152 of 64.

    Newer macOS allow a little more; where torch can ask (2.5 on), ``read_facts`` takes the true number.
    """
    return memory * 2 // 3 if memory <= 32 * GIB else memory * 3 // 4


def apple_largest_buffer(working_set: int) -> int:
    """Metal's ``maxBufferLength`` as Macs report it: 4 GiB of 5.33, 108 of 144."""
    return working_set * 3 // 4


def apple_bf16(torch: Version, macos: Version) -> bool:
    """Whether mps takes bfloat16: from torch 2.3 on, on macOS 14 and newer."""
    return torch >= (2, 3) and macos >= (14,)


def best_device() -> str:
    """``"mps"`` where this torch can use a Mac's GPU, else ``"cuda"`` where there is one, else ``"cpu"``."""
    import torch

    if torch.backends.mps.is_available():
        return "mps"
    return "cuda" if torch.cuda.is_available() else "cpu"


def read_facts(device: str | torch.device | None = None, *, weights: int = 0) -> Facts:
    """The facts of this machine for a device (``"mps"``, ``"cuda:1"``, …); by default the best one that it has.

    weights: the bytes of this pipeline's weights that are on the device already; on a GPU with memory of its own,
    anything else of this process counts as used, like another program's memory.

    Raises:
        InputError: a device of another kind.
        DeviceError: this machine or this torch does not have the device; says which of the two it is.
    """
    name = str(device) if device is not None else best_device()
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return cpu_facts(machine_facts())
    if kind == "mps":
        return mps_facts(machine_facts())
    if kind == "cuda":
        return cuda_facts(machine_facts(), int(index) if index.isdigit() else 0, weights)
    raise InputError(f"Russet runs on 'mps', 'cuda' and 'cpu', not on {name!r}")


def machine_facts() -> dict[str, Any]:
    """The facts that do not depend on the device."""
    import psutil
    import torch

    memory, mps, macos = psutil.virtual_memory(), torch.backends.mps, platform.mac_ver()[0]
    total, available = within_container(memory.total, memory.available)
    return {
        "memory": total,
        "available": available,
        "ram": total,
        "swap_used": psutil.swap_memory().used,
        "cores": psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        "system": "macOS" if macos else platform.system(),
        "macos": parse_version(macos) if macos else (),
        "machine": platform.machine(),
        "rosetta": bool(macos) and sysctl("sysctl.proc_translated") == "1",
        "python": tuple(sys.version_info[:3]),
        "torch": parse_version(torch.__version__),
        "mps_built": mps.is_built() if hasattr(mps, "is_built") else False,
        "mps_available": mps.is_available(),
        "cuda": parse_version(torch.version.cuda) if torch.version.cuda else (),
    }


def within_container(total: int, available: int) -> tuple[int, int]:
    """Total and available memory, lowered to the limit of a Linux container (cgroup v2)."""
    limit, used = (read_text(f"/sys/fs/cgroup/memory.{part}") for part in ("max", "current"))
    if not (limit.isdigit() and used.isdigit()):
        return total, available
    return min(total, int(limit)), max(0, min(available, int(limit) - int(used)))


def process_memory() -> int:
    """Bytes of memory that this process holds beyond Python and torch themselves: weights, mostly."""
    import psutil

    return max(0, int(psutil.Process().memory_info().rss) - PYTHON_AND_TORCH)


@functools.cache
def sysctl(name: str) -> str:
    """One value of macOS's sysctl; empty for an unknown name."""
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def read_text(path: str) -> str:
    """A small file's text; empty where it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def cpu_facts(common: dict[str, Any]) -> Facts:
    """The processor. torch has an operator for oneDNN's linear layer from 2.0 on."""
    import torch

    chip, flags = cpu()
    built = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return Facts(
        device="cpu",
        chip=chip,
        held=process_memory(),
        bf16=not flags.isdisjoint(("amx_bf16", "avx512_bf16")),
        amx=built and common["torch"] >= (2, 0) and has_amx(flags) and torch_sees_amx(),
        glibc=glibc_decides(),
        onednn=built and hasattr(torch.ops.mkldnn, "_linear_pointwise"),
        **common,
    )


@functools.cache
def cpu() -> tuple[str, frozenset[str]]:
    """The name of the processor, and the instruction sets that Linux reports for it (empty on other systems)."""
    if platform.system() == "Darwin":
        return sysctl("machdep.cpu.brand_string") or platform.machine(), frozenset()
    found = dict(re.findall(r"^(model name|flags)\s*:\s*(.*)$", read_text("/proc/cpuinfo"), re.MULTILINE))
    name = found.get("model name") or platform.processor() or platform.machine()
    return name, frozenset(found.get("flags", "").split())


def has_amx(flags: frozenset[str]) -> bool:
    """Whether a CPU with these instruction sets has matrix units for bfloat16 (x86's AMX) that oneDNN may use."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "AMX")).upper()
    return {"amx_bf16", "amx_tile"} <= flags and ("AMX" in allowed or allowed in ("DEFAULT", "ALL"))


def torch_sees_amx() -> bool:
    """What torch says of AMX (2.5 on); True where it cannot say."""
    import torch

    ask = getattr(getattr(torch, "cpu", None), "_is_amx_tile_supported", None)
    return ask is None or bool(ask())


def glibc_decides() -> bool:
    """Whether glibc's malloc frees memory, and its settings are the defaults."""
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION") if hasattr(os, "confstr") else None
    except ValueError:  # another C library
        version = None
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return bool(version) and not tuned and "LD_PRELOAD" not in os.environ


def mps_facts(common: dict[str, Any]) -> Facts:
    """A Mac's GPU. Raises DeviceError with the reason where torch cannot use it."""
    import torch

    if not common["mps_available"]:
        raise DeviceError(f"the device 'mps' is not available here: {why_no_mps(common)}")
    memory = common["memory"]
    mps = getattr(torch, "mps", None)
    ask_limit = getattr(mps, "recommended_max_memory", None)
    ask_held = getattr(mps, "driver_allocated_memory", None)
    driver = int(ask_held()) if ask_held else 0
    working_set = int(ask_limit()) if ask_limit else apple_working_set(memory)
    return Facts(
        device="mps",
        chip=sysctl("machdep.cpu.brand_string") or "Apple GPU",
        held=max(driver, process_memory()),  # the weights are in one of the two, in the same memory
        working_set=working_set,
        largest_buffer=apple_largest_buffer(working_set),
        bf16=apple_bf16(common["torch"], common["macos"]),
        **common,
    )


def why_no_mps(common: dict[str, Any]) -> str:
    """The reason why mps is not available, and what to do about it."""
    if common["system"] != "macOS":
        return f"this is {common['system']}, and mps is the GPU of a Mac; use 'cuda' or 'cpu'"
    if common["rosetta"] or common["machine"] != "arm64":
        return f"this Python is built for {common['machine']}; install an arm64 Python and PyTorch into it"
    if not common["mps_built"]:
        return "this PyTorch was built without mps; install the arm64 wheel from PyPI (pip install torch)"
    return "this macOS is too old for this PyTorch, or no GPU is visible; run `russet doctor`"


@functools.cache
def can_compile() -> bool:
    """Whether Triton is installed, and a C compiler with which it builds its launchers."""
    compilers = ("gcc", "clang", "cc")
    found = "CC" in os.environ or any(shutil.which(name) for name in compilers)
    return found and importlib.util.find_spec("triton") is not None


def cuda_facts(common: dict[str, Any], index: int, weights: int) -> Facts:
    """An NVIDIA (or, through ROCm, AMD) GPU. Raises DeviceError where there is none of that index."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise DeviceError(f"the device 'cuda:{index}' is not available here: torch sees {count} CUDA devices")
    card = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return Facts(
        device="cuda",
        chip=card.name,
        held=weights
        + torch.cuda.memory_reserved(index)
        - torch.cuda.memory_allocated(index),  # freed, but cached by torch
        capability=(card.major, card.minor),
        bf16=card.major >= 8,
        triton=card.major >= 7 and torch.version.hip is None and can_compile(),
        **{**common, "memory": total, "available": free, "cores": card.multi_processor_count},
    )


def gigabytes(size: float) -> str:
    """Bytes as a person reads them, rounded upward: ``"2.87 GB"`` (10⁹ bytes)."""
    return f"{math.ceil(size / 1e7) / 100:.2f} GB"
