"""What torch and Python answer about the machine while a virtual Mac is active.

``torch.mps`` and ``torch.backends.mps`` answer as the virtual torch's would: what that version does not have is absent.
``torch.__version__``, ``platform``, ``psutil`` and the ``sysctl`` command speak of the Mac. Everything is put back when
the Mac is left.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import subprocess
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch.nn import functional as F

from . import rules
from .kernels import Version
from .streams import VirtualGenerator

if TYPE_CHECKING:
    from .machine import VirtualMac

ABSENT = object()
SETTINGS = ("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "PYTORCH_MPS_LOW_WATERMARK_RATIO")
PYTHON = 300 * 2**20  # what Python and torch take of the memory by themselves

SINCE: dict[str, Version] = {  # of torch.mps and torch.backends.mps, where it was not there from the start
    **dict.fromkeys(
        (
            "synchronize",
            "empty_cache",
            "set_per_process_memory_fraction",
            "current_allocated_memory",
            "driver_allocated_memory",
            "get_rng_state",
            "set_rng_state",
        ),
        (2, 0),
    ),
    "device_count": (2, 4),
    "recommended_max_memory": (2, 5),
    "is_macos_or_newer": (2, 3),
    "get_name": (2, 9),
    "get_core_count": (2, 9),
    "compile_shader": (2, 7),
    "Event": (2, 1),
    "event": (2, 1),
    "profiler": (2, 1),
}
ACCELERATOR_SINCE: dict[str, Version] = {"current_device_index": (2, 8)}


class Replaced:
    """Attributes given other values, and put back in reverse order, with the environment that a program may set."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, str, Any]] = []
        self.settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Replaces an attribute, makes it, or with ``ABSENT`` removes it."""
        self.kept.append((owner, name, getattr(owner, name, ABSENT)))
        self._write(owner, name, value)

    def restore(self) -> None:
        while self.kept:
            self._write(*self.kept.pop())
        for name in SETTINGS:
            os.environ.pop(name, None)
        os.environ.update(self.settings)

    @staticmethod
    def _write(owner: Any, name: str, value: Any) -> None:
        if value is not ABSENT:
            setattr(owner, name, value)
        elif hasattr(owner, name):
            delattr(owner, name)


def install(mac: VirtualMac, replaced: Replaced) -> None:
    """Makes torch and Python answer for the Mac until ``replaced.restore()``."""
    replaced.set(torch, "__version__", type(torch.__version__)(".".join(map(str, mac.torch))))
    replaced.set(torch, "Generator", VirtualGenerator)
    replaced.set(torch._C, "_has_mps", True)
    if mac.has("no-sdpa"):
        replaced.set(F, "scaled_dot_product_attention", ABSENT)
    if not hasattr(torch, "mps"):  # the installed torch is older than 2.0
        replaced.set(torch, "mps", SimpleNamespace())
    install_accelerator(mac, replaced)
    for owner, functions in ((torch.backends.mps, backend(mac)), (torch.mps, device_module(mac))):
        for name, function in functions.items():
            since = (2, 5) if (owner, name) == (torch.mps, "is_available") else SINCE.get(name, ())
            replaced.set(owner, name, function if mac.torch >= since else ABSENT)
    install_host(mac, replaced)


def backend(mac: VirtualMac) -> dict[str, Callable[..., Any]]:
    """``torch.backends.mps``."""
    return {
        "is_built": lambda: True,
        "is_available": lambda: mac.available,
        "is_macos_or_newer": lambda major, minor: mac.macos >= (major, minor),
        "is_macos13_or_newer": lambda minor=0: mac.macos >= (13, minor),
        "get_name": lambda: mac.name,
        "get_core_count": lambda: 8,
    }


def device_module(mac: VirtualMac) -> dict[str, Any]:
    """``torch.mps``."""
    account = mac.account

    def set_fraction(fraction: float) -> None:
        if not isinstance(fraction, float):
            raise TypeError("Invalid type for fraction argument, must be `float`")
        if fraction < 0 or fraction > 2:
            raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~2")
        account.limit_to(fraction)

    def empty_cache() -> None:
        account.start()
        account.cached = account.live

    def asked(answer: Callable[[], int]) -> Callable[[], int]:
        def after_start() -> int:
            account.start()
            return answer()

        return after_start

    return {
        "device_count": lambda: int(mac.available),
        "is_available": lambda: mac.available,
        "synchronize": lambda: account.sync("synchronize"),
        "manual_seed": mac.generator.manual_seed,
        "seed": mac.generator.seed,
        "get_rng_state": lambda device="mps": mac.generator.get_state(),
        "set_rng_state": lambda state, device="mps": mac.generator.set_state(state),
        "empty_cache": empty_cache,
        "set_per_process_memory_fraction": set_fraction,
        "current_allocated_memory": asked(lambda: account.live),
        "driver_allocated_memory": asked(lambda: account.cached),
        "recommended_max_memory": asked(lambda: mac.working_set),
        "compile_shader": no_shaders,
        "Event": event_class(mac),
        "event": SimpleNamespace(Event=event_class(mac)),
        "profiler": Profiler,
    }


def no_shaders(source: str) -> Any:
    raise rules.Hazard("a shader of one's own is not part of the virtual device, which knows torch's operators only")


class Profiler:
    """``torch.mps.profiler``: there is nothing to be seen in Instruments, so it does nothing."""

    @staticmethod
    def start(mode: str = "interval", wait_until_completed: bool = False) -> None:
        pass

    @staticmethod
    def stop() -> None:
        pass

    @staticmethod
    def profile(mode: str = "interval", wait_until_completed: bool = False) -> Any:
        return contextlib.nullcontext()


def event_class(mac: VirtualMac) -> type:
    """``torch.mps.Event`` for one Mac. Every kernel is done at once, but an event may say "not yet" a few times.

    To wait for one counts as a wait; to ask does not. ``come``: whether it has said that it has come.
    """

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.timed = enable_timing
            self.recorded = 0.0
            self.asked = 0
            self.come = False

        def record(self) -> None:
            self.recorded = time.perf_counter()
            self.asked, self.come = 0, False
            mac.events.append(self)

        def wait(self) -> None:
            pass

        def query(self) -> bool:
            self.asked += 1
            self.come = self.recorded > 0 and self.asked > mac.late_events
            return self.come

        def synchronize(self) -> None:
            mac.account.sync("event")
            self.come = True

        def elapsed_time(self, end: Event) -> float:
            """Milliseconds."""
            if not (self.timed and end.timed):
                raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
            return 1000 * (end.recorded - self.recorded)

    return Event


def install_accelerator(mac: VirtualMac, replaced: Replaced) -> None:
    """``torch.accelerator``, which torch has from 2.6 on."""
    owner = getattr(torch, "accelerator", None)
    if owner is None:
        return
    answers = {
        "is_available": lambda: mac.available,
        "device_count": lambda: int(mac.available),
        "current_accelerator": lambda check_available=False: torch.device("mps"),
        "current_device_index": lambda: 0,
        "synchronize": lambda device=None: mac.account.sync("synchronize"),
    }
    if mac.torch < (2, 6):
        if mac.shapes_only:
            importlib.import_module("torch._dynamo")  # some operators' shapes do, and it asks for all of this torch
        replaced.set(torch, "accelerator", ABSENT)
        return
    for name, function in answers.items():
        replaced.set(owner, name, function if mac.torch >= ACCELERATOR_SINCE.get(name, ()) else ABSENT)


def install_host(mac: VirtualMac, replaced: Replaced) -> None:
    """What Python and psutil say of the computer.

    ``sys.platform`` stays: modules that are first imported on the Mac would take themselves for a Mac's for good.
    """
    memory = psutil.virtual_memory()

    def memory_now() -> Any:
        """What other programs leave, less what the device holds of it."""
        available = max(0, mac.free_memory - mac.account.live)
        return memory._replace(total=mac.memory, available=available, used=mac.memory - available)

    swap = psutil.swap_memory()._replace(total=0, used=0)
    replaced.set(platform, "system", lambda: "Darwin")
    replaced.set(platform, "machine", lambda: "arm64")
    replaced.set(platform, "mac_ver", lambda *args, **kwargs: (".".join(map(str, mac.macos)), ("", "", ""), "arm64"))
    replaced.set(psutil, "virtual_memory", memory_now)
    replaced.set(psutil, "swap_memory", lambda: swap)
    replaced.set(psutil.Process, "memory_info", lambda process: SimpleNamespace(rss=PYTHON + mac.account.live))
    real = subprocess.run
    sysctl = {"machdep.cpu.brand_string": mac.name, "sysctl.proc_translated": "0", "hw.memsize": str(mac.memory)}

    def run(command: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(command, (list, tuple)) or not str(command[0]).endswith("sysctl"):
            return real(command, *args, **kwargs)
        known = sysctl.get(command[-1])
        return SimpleNamespace(returncode=int(known is None), stdout=f"{known or ''}\n", stderr="")

    replaced.set(subprocess, "run", run)
