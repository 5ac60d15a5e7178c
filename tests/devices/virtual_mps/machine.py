"""The virtual Mac: a chip, its memory, a macOS and a torch, and everything that follows from them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from russet.hardware import facts

from . import rules
from .account import Account, Counts
from .answers import Replaced, install
from .defects import DEFECTS
from .functions import Functions
from .kernels import Version, version
from .operators import Operators, poison
from .shapes import Shapes
from .streams import VirtualGenerator
from .tensor import VirtualTensor

GIB = 2**30
OLDEST_MACOS: tuple[tuple[Version, Version], ...] = (  # per torch release
    ((2, 15), (15,)),
    ((2, 9), (14,)),
    ((2, 6), (13,)),
    ((), (12, 3)),
)


class VirtualMac:
    """A Mac with Apple silicon, as a context manager: inside, ``"mps"`` is a device of this machine.

    Args:
        chip: ``"M1"``, ``"M2 Pro"``, …
        memory_gib: unified memory. ``free_gib`` is what other programs leave of it, half by default.
        macos, torch: versions. A torch older than the installed one lacks the kernels that it lacked.
        bugs: ids of ``virtual_mps.defects`` to have instead of those that such a machine has.
        non_blocking: what a ``non_blocking`` copy to or from the device does: "refuse" raises ``Hazard``, "corrupt"
            gives NaN, as a copy that is read too early may.
        shapes_only: nothing is computed, and nothing takes memory: shapes, kernels, waits and bytes are as they would
            be, so a full-size network takes a second. Numbers read from the device are all ``reads``.
        late_events: how often an event says, when asked, that the device has not come so far yet. ``events`` are all
            that were recorded.
    """

    active: VirtualMac | None = None

    def __init__(
        self,
        chip: str = "M1",
        *,
        memory_gib: float = 16,
        free_gib: float | None = None,
        macos: str = "15.0",
        torch: str = "2.13.0",
        bugs: Iterable[str] | None = None,
        non_blocking: str = "refuse",
        shapes_only: bool = False,
        reads: float = 1.0,
        late_events: int = 0,
    ) -> None:
        self.name = f"Apple {chip}"
        self.memory = int(memory_gib * GIB)
        self.free_memory = int((memory_gib / 2 if free_gib is None else free_gib) * GIB)
        self.macos, self.torch = version(macos), version(torch)
        self.available = self.macos >= next(oldest for first, oldest in OLDEST_MACOS if self.torch >= first)
        known = {defect.id for defect in DEFECTS}
        if unknown := set(bugs or ()) - known:
            raise ValueError(f"no such bugs: {sorted(unknown)}; there are {sorted(known)}")
        self.bugs = {d.id for d in DEFECTS if d.holds(chip, self.torch, self.macos)} if bugs is None else set(bugs)
        self.non_blocking, self.shapes_only, self.reads = non_blocking, shapes_only, reads
        self.late_events = late_events
        self.events: list[Any] = []
        self.host = "meta" if shapes_only else "cpu"
        self.working_set = self.memory * 2 // 3 if self.memory <= 32 * GIB else self.memory * 3 // 4
        self.account = Account(self.working_set * 3 // 4, self.working_set)
        self.generator: Any = VirtualGenerator("mps")
        self.shapes = Shapes()
        self.graphs: set[Any] = set()  # compiled so far
        self.operators, self.functions = Operators(self), Functions(self)

    def has(self, bug: str) -> bool:
        return bug in self.bugs

    def measure(self) -> AbstractContextManager[Counts]:
        """Counts kernels, waits and bytes of the block: ``with mac.measure() as counts: …``."""
        return self.account.measure()

    # -- being active

    def __enter__(self) -> VirtualMac:
        if VirtualMac.active is not None:
            raise RuntimeError(f"{VirtualMac.active.name} is active already; virtual Macs do not nest")
        VirtualMac.active = self
        forget_the_host()
        self._replaced = Replaced()
        install(self, self._replaced)
        self._overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._replaced.set(threading.Thread, "run", self.in_thread(threading.Thread.run))
        self.functions.__enter__()
        self.operators.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.operators.__exit__(*error)
        self.functions.__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(self._overwrite)
        self._replaced.restore()
        forget_the_host()
        VirtualMac.active = None

    def in_thread(self, run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
        """``Thread.run`` with the modes, which torch keeps per thread: threads started on the Mac are on it too."""

        def on_the_mac(thread: threading.Thread) -> None:
            with Functions(self), Operators(self):
                run(thread)

        return on_the_mac

    def require_active(self) -> None:
        """Raises RuntimeError outside of the context, and on a Mac whose macOS is too old for its torch."""
        if VirtualMac.active is not self:
            raise RuntimeError(f"a tensor of {self.name} was used after the virtual Mac was left")
        if not self.available:
            raise RuntimeError(
                "The MPS backend is supported on a newer macOS than "
                f"{'.'.join(map(str, self.macos))}. Current OS version can be queried using `sw_vers`"
            )

    # -- between device and host

    def check_dtype(self, dtype: torch.dtype) -> None:
        rules.check_dtype(dtype, self.torch, self.macos)

    def to_host(self, x: Any) -> Any:
        """What stands for a tensor when an operator is computed."""
        if isinstance(x, VirtualTensor):
            return x.host
        return x.to("meta") if self.shapes_only and isinstance(x, Tensor) and x.dim() > 0 else x

    def readable(self, x: Tensor) -> Tensor:
        """A host tensor with numbers in it."""
        return torch.full(x.shape, self.reads, dtype=x.dtype) if x.is_meta else x

    def hurried(self, hasty: bool, x: Tensor) -> Tensor:
        """The result of a copy between host and device; a hasty one does not wait for the data."""
        if hasty and self.non_blocking == "refuse":
            raise rules.Hazard("a non_blocking copy to or from mps reads memory before it is written (pytorch#139550)")
        if hasty:
            poison(x)
        return x


def forget_the_host() -> None:
    """Has what Russet reads once of a machine read again."""
    for function in vars(facts).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
