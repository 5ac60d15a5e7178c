"""A weight file that is held open: its bytes read, or mapped into memory.

Mapped bytes are the page cache's own. Nothing is copied, the system may take the pages back while they are not used,
and what a program writes to them stays in the program: the mapping is private, and the file is never written to.
Holding the file open keeps what was found in it when another takes its name, as when a pipeline is saved over the
folder that it came from. Not even this helps where a file is rewritten in place while it is mapped; see
docs/en/checkpoints.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from russet.errors import CheckpointError, CorruptFile, MissingFile

LFS_MARK = b"version https://git-lfs"
HELD = (
    os.name == "posix"
)  # Windows lets nobody replace a file that is open or mapped, so there files are read and closed
CHUNK = 1 << 20  # bytes read at a time

_CHANGING = threading.Lock()


@dataclasses.dataclass(eq=False)
class StoredFile:
    """A file as it was when its header was read, so that a later change is noticed instead of believed."""

    path: Path
    size: int
    changed: int  # nanoseconds
    _held: int | None = dataclasses.field(default=None, init=False, repr=False)  # a descriptor
    _whole: weakref.ref[mmap.mmap] | None = dataclasses.field(default=None, init=False, repr=False)

    @classmethod
    def at(cls, path: Path) -> StoredFile:
        """Looks at a file without opening it: to open a pipe or a device may have effects, or never end.

        Raises:
            MissingFile: nothing is there.
            CorruptFile: a folder or something else that is no file is there.
        """
        try:
            facts = path.stat()
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            why = getattr(error, "strerror", None) or error
            raise MissingFile(f"{str(path)[:1000]!r} cannot be opened: {why}") from None
        if stat.S_ISDIR(facts.st_mode):
            raise CorruptFile(f"{path} is a folder; a weight file was expected")
        if not stat.S_ISREG(facts.st_mode):
            raise CorruptFile(f"{path} is not a regular file")
        return cls(path, facts.st_size, facts.st_mtime_ns)

    def __deepcopy__(self, memo: Any) -> StoredFile:
        """The same file with a mapping of its own: what is written to weights does not reach those of a copy."""
        other = StoredFile(self.path, self.size, self.changed)
        with _CHANGING:
            if self._held is not None:
                other._held = os.dup(self._held)
                weakref.finalize(other, os.close, other._held)
        return other

    def __reduce__(self) -> Any:
        return type(self), (self.path, self.size, self.changed)

    def read_bytes(self, offset: int, count: int) -> bytes:
        """``count`` bytes at ``offset``; fewer where the file ends.

        Raises:
            MissingFile, CheckpointError: the file cannot be opened or read.
            CorruptFile: it is no longer as it was.
        """
        count = max(0, min(count, self.size - offset))
        with self._open() as descriptor:
            return b"".join(self._pieces(descriptor, offset, count))

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fills ``memory`` with the bytes at ``offset``; raises as ``read_bytes`` does, and where the file ends."""
        done = 0
        with self._open() as descriptor:
            for piece in self._pieces(descriptor, offset, len(memory)):
                memory[done : done + len(piece)] = piece
                done += len(piece)
        if done < len(memory):
            raise CorruptFile(f"{self.path} ends too early: it was cut short while it was being loaded")

    def mapped(self) -> mmap.mmap | None:
        """The whole file as memory: one mapping, for as long as anything of it is used. None where that cannot be."""
        with self._open() as descriptor, _CHANGING:
            memory = None if self._whole is None else self._whole()
            if memory is None and (memory := _map(descriptor, 0, self.size)) is not None:
                self._whole = weakref.ref(memory)
            return memory

    def mapped_part(self, offset: int, count: int) -> tuple[mmap.mmap, int] | None:
        """``count`` bytes as a mapping of their own, and where in it they begin. None where that cannot be."""
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        with self._open() as descriptor:
            memory = _map(descriptor, start, offset + count - start)
        return None if memory is None else (memory, offset - start)

    def placeholder(self) -> str | None:
        """What to tell when the file only stands where its content should be: an empty file, a git-lfs pointer."""
        if self.size == 0:
            return f"{self.path} is empty; download it again"
        if self.read_bytes(0, len(LFS_MARK)) == LFS_MARK:
            return (
                f"{self.path} is a git-lfs pointer, not the file itself; "
                "run `git lfs pull` in its folder, or download the file"
            )
        return None

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        """A descriptor of the file, which is as it was."""
        descriptor = self._hold() if HELD else self._descriptor()
        try:
            facts = os.fstat(descriptor)
            if (facts.st_size, facts.st_mtime_ns) != (self.size, self.changed):
                raise CorruptFile(f"{self.path} was changed while it was being loaded; load it again")
            yield descriptor
        finally:
            if not HELD:
                os.close(descriptor)

    def _hold(self) -> int:
        with _CHANGING:
            if self._held is None:
                self._held = self._descriptor()
                weakref.finalize(self, os.close, self._held)
            return self._held

    def _descriptor(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise MissingFile(f"{self.path} cannot be opened: {error.strerror or error}") from None

    def _pieces(self, descriptor: int, offset: int, count: int) -> Iterator[bytes]:
        end = offset + count
        while offset < end:
            try:
                piece = _read_at(descriptor, offset, min(CHUNK, end - offset))
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
            if not piece:
                return
            yield piece
            offset += len(piece)


def _map(descriptor: int, offset: int, count: int) -> mmap.mmap | None:
    if not HELD:
        return None
    try:
        return mmap.mmap(descriptor, count, access=mmap.ACCESS_COPY, offset=offset)
    except (OSError, ValueError):  # a file system that cannot, or no address space left
        return None


def _read_at(descriptor: int, offset: int, count: int) -> bytes:
    if HELD:  # several threads share the descriptor, and with it the position that read() goes by
        return os.pread(descriptor, count, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, count)
