"""What glibc does with memory that is freed: by itself, blocks of more than 32 MiB go back to the system at once.

An operation on a CPU makes a new map of some 10 or 100 MB, which the system has to clear page by page, and gives back
the last one. While a UNet works, ``kept()`` has blocks stay for the next operation: a call of Stable Diffusion 1.5 in
float32, on one thread, spends 2 to 3 of 16 processor seconds on clearing pages without it, and 0.4 with it. What lies
unused between blocks then is 100 to 200 MB. A VAE works once a picture, with maps ten times as large, and what lies
between them would be the most memory that the picture takes: ``returned()`` has all blocks go back, for one second.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MIB = 2**20
KEPT, KEPT_FREE = (128 * MIB, 32 * MIB), 256 * MIB  # older versions of glibc refuse blocks above 32 MiB
RETURNED, RETURNED_FREE = (8 * MIB,), 32 * MIB
OWN, OWN_FREE = (32 * MIB,), 64 * MIB  # what glibc itself comes to, once a program has freed a block of 32 MiB

_lock = threading.Lock()
_users = 0


def kept() -> contextlib.AbstractContextManager[None]:
    """Keeps what is freed for as long as the block lasts, and then gives it back. For Linux with glibc.

    Process-wide: of blocks that overlap, in threads, the first one decides and the last one gives back.
    """
    return _ruled(KEPT, KEPT_FREE)


def returned() -> contextlib.AbstractContextManager[None]:
    """The same, but gives back what is freed at once."""
    return _ruled(RETURNED, RETURNED_FREE)


@contextlib.contextmanager
def _ruled(largest: tuple[int, ...], free: int) -> Iterator[None]:
    global _users
    libc = ctypes.CDLL(None)
    with _lock:
        _users += 1
        if _users == 1:
            libc.malloc_trim(0)  # what reading weights has left behind
            _set(libc, largest, free)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _set(libc, OWN, OWN_FREE)
                libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, largest: tuple[int, ...], free: int) -> None:
    """Blocks of up to ``largest`` bytes stay when they are freed, and up to ``free`` bytes at the heap's end."""
    any(libc.mallopt(M_MMAP_THRESHOLD, size) for size in largest)
    libc.mallopt(M_TRIM_THRESHOLD, free)
