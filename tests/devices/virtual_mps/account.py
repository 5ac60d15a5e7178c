"""What the virtual device did: kernels run, views made, waits of the host, and bytes, each storage once."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch


class Buffer:
    """One live storage on the device: the tensors that share it hold it, its bytes are free when the last is gone."""

    def __init__(self, account: Account, nbytes: int) -> None:
        self.account, self.nbytes = account, nbytes

    def __del__(self) -> None:
        self.account.free(self.nbytes)


@dataclass
class Counts:
    """What happened in a stretch of time.

    kernels: operators run on the device, by name; one that the virtual torch decomposes counts as its parts.
    views: operators that only made a view, by name. They cost the host a little and the device nothing.
    allocations: how often uninitialised memory was asked for (``empty``), by name.
    syncs: how often the host waited for the device, by reason; "upload" is a blocking copy to it.
    bytes: all that was allocated, summed up. peak: the most bytes live at once. start: those live at the beginning.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    views: Counter[str] = field(default_factory=Counter)
    allocations: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    start: int = 0
    peak: int = 0

    @property
    def kernel_count(self) -> int:
        return sum(self.kernels.values())

    @property
    def sync_count(self) -> int:
        return sum(self.syncs.values())

    @property
    def extra(self) -> int:
        """Peak bytes above what was live at the beginning: what the work itself needs over its inputs and weights."""
        return self.peak - self.start


class Account:
    """Keeps the counts of a virtual device; ``measure`` gives those of a stretch of a program."""

    def __init__(self, largest_buffer: int, working_set: int) -> None:
        self.largest_buffer, self.working_set = largest_buffer, working_set
        self._limit: int | None = None
        self.live = 0
        self.cached = 0  # the most that was live since the cache was last emptied: freed blocks stay with the driver
        self.total = Counts()
        self._open = [self.total]
        self._buffers: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()

    @property
    def limit(self) -> int:
        """Bytes that may be live at once; 0 is no limit. torch reads its setting when the allocator starts."""
        if self._limit is None:
            self.limit_to(float(os.environ.get("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "1.7")))
        return self._limit or 0

    def start(self) -> None:
        """Starts the allocator, which reads its setting then: to be asked about memory is enough."""
        assert self.limit >= 0

    def limit_to(self, ratio: float) -> None:
        self._limit = int(ratio * self.working_set)

    @contextlib.contextmanager
    def measure(self) -> Iterator[Counts]:
        """Counts what happens inside the block; blocks may be nested."""
        counts = Counts(start=self.live, peak=self.live)
        with self._lock:
            self._open.append(counts)
        try:
            yield counts
        finally:
            with self._lock:
                self._open = [one for one in self._open if one is not counts]

    def kernel(self, name: str, times: int = 1) -> None:
        self._note("kernels", name, times)

    def view(self, name: str) -> None:
        self._note("views", name)

    def allocation(self, name: str) -> None:
        self._note("allocations", name)

    def sync(self, reason: str) -> None:
        self._note("syncs", reason)

    def _note(self, kind: str, name: str, times: int = 1) -> None:
        with self._lock:
            for counts in self._open:
                getattr(counts, kind)[name] += times

    def hold(self, storage: torch.UntypedStorage) -> Buffer:
        """The buffer of a storage, allocated when the storage is first seen.

        Raises:
            RuntimeError: one buffer, or all together, would be larger than the device allows.
        """
        with self._lock:
            found = self._buffers.get(storage._cdata)
            if found is None:
                self.allocate(storage.nbytes())
                found = self._buffers[storage._cdata] = Buffer(self, storage.nbytes())
            elif found.nbytes != storage.nbytes():  # it was resized
                self.free(found.nbytes)
                found.nbytes = 0
                self.allocate(storage.nbytes())
                found.nbytes = storage.nbytes()
            return found

    def scratch(self, nbytes: int) -> None:
        """Memory that a kernel takes and gives back before the next one."""
        self.allocate(nbytes)
        self.free(nbytes)

    def allocate(self, nbytes: int) -> None:
        self.check(nbytes)
        with self._lock:
            self.live += nbytes
            self.cached = max(self.cached, self.live)
            for counts in self._open:
                counts.bytes += nbytes
                counts.peak = max(counts.peak, self.live)

    def free(self, nbytes: int) -> None:
        with self._lock:
            self.live -= nbytes

    def check(self, nbytes: int) -> None:
        """Raises, in torch's words, if that many more bytes cannot be had."""
        if nbytes > self.largest_buffer:
            raise RuntimeError(f"Invalid buffer size: {gib(nbytes)}")
        if 0 < self.limit < self.live + nbytes:
            raise RuntimeError(
                f"MPS backend out of memory (MPS allocated: {gib(self.live)}, other allocations: 0 bytes, max allowed: "
                f"{gib(self.limit)}). Tried to allocate {gib(nbytes)} on private pool. Use "
                "PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations "
                "(may cause system failure)."
            )


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
