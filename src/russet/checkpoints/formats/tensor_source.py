"""Tensors in weight files: where their bytes lie, and how they come into memory.

A ``StoredTensor`` is what a header says about one tensor; nothing is read until ``read()``. A ``DerivedTensor`` is
computed from another one when it is read. Both are a ``TensorSource``.

Mapped bytes are the page cache's own: nothing is copied, and the system may take the pages back while they are not
used. The mapping is private, so what a program writes to it never reaches the file. A ``StoredFile`` stays open, so its
content remains available when another file takes its name, as when a pipeline is saved over the folder that it came
from. This does not help where a file is rewritten in place while it is mapped; see docs/en/checkpoints.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from russet.errors import CheckpointError, CorruptFile, MissingFile

if TYPE_CHECKING:
    import torch

# By the names that the safetensors format gives to types: torch's name, bytes per element. A type that the installed
# torch lacks is refused when a tensor of it is read.
TYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
TORCH_NAMES = {name: torch_name for name, (torch_name, _) in TYPES.items()}
ITEM_SIZES = {name: size for name, (_, size) in TYPES.items()}

RANK_LIMIT = 8  # dimensions of a tensor; convolution weights have four
CHUNK = 1 << 20  # bytes read at a time
LFS_MARK = b"version https://git-lfs"

# Windows does not let a file be replaced while it is open or mapped; there, files are opened for each read.
KEEP_OPEN = os.name == "posix"

_LOCK = threading.Lock()  # around the fields of a StoredFile that change


class TensorSource(Protocol):
    """A tensor whose shape and type are known, and whose values can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def torch_dtype(self) -> torch.dtype: ...

    def read(self, *, brief: bool = False) -> torch.Tensor:
        """The values on the CPU, writable.

        Args:
            brief: the caller copies them at once, so the memory should be released together with the returned tensor.
        """


@dataclasses.dataclass(eq=False)
class StoredFile:
    """A file as it was when its header was read: a later change raises CorruptFile instead of giving wrong values."""

    path: Path
    size: int
    changed: int  # nanoseconds
    _descriptor: int | None = dataclasses.field(default=None, init=False, repr=False)
    _whole: weakref.ref[mmap.mmap] | None = dataclasses.field(default=None, init=False, repr=False)

    @classmethod
    def at(cls, path: Path) -> StoredFile:
        """Takes size and time without opening the file: opening a pipe or a device may have effects, or block."""
        try:
            facts = path.stat()
        except (OSError, ValueError) as error:
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
        with _LOCK:
            if self._descriptor is not None:
                other._descriptor = os.dup(self._descriptor)
                weakref.finalize(other, os.close, other._descriptor)
        return other

    def __reduce__(self) -> Any:
        return type(self), (self.path, self.size, self.changed)

    def read_bytes(self, offset: int, count: int) -> bytes:
        """``count`` bytes at ``offset``; fewer where the file ends."""
        return b"".join(self._chunks(offset, max(0, min(count, self.size - offset))))

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fills ``memory`` with the bytes at ``offset``; CorruptFile where the file ends before."""
        done = 0
        for chunk in self._chunks(offset, len(memory)):
            memory[done : done + len(chunk)] = chunk
            done += len(chunk)
        if done < len(memory):
            raise CorruptFile(f"{self.path} ends too early: it was cut short while it was being loaded")

    def map(self, offset: int, count: int, *, whole: bool) -> tuple[mmap.mmap, int] | None:
        """Memory with ``count`` bytes of the file, and where in it they begin. None where mapping is not possible.

        ``whole``: the one mapping of the whole file, which lives as long as anything of it is used; else a mapping of
        these bytes alone.
        """
        start, end = (0, self.size) if whole else (offset - offset % mmap.ALLOCATIONGRANULARITY, offset + count)
        with self._open() as descriptor, _LOCK:
            memory = self._whole() if whole and self._whole is not None else None
            if memory is None:
                if not KEEP_OPEN:
                    return None
                try:
                    memory = mmap.mmap(descriptor, end - start, access=mmap.ACCESS_COPY, offset=start)
                except (OSError, ValueError):  # not all file systems can, or no address space is left
                    return None
                if whole:
                    self._whole = weakref.ref(memory)
        return memory, offset - start

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        """A descriptor of the file; CorruptFile if the file has changed."""
        with _LOCK:
            descriptor = self._descriptor
            if descriptor is None:
                try:
                    descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                except OSError as error:
                    raise MissingFile(f"{self.path} cannot be opened: {error.strerror or error}") from None
                if KEEP_OPEN:
                    self._descriptor = descriptor
                    weakref.finalize(self, os.close, descriptor)
        try:
            facts = os.fstat(descriptor)
            if (facts.st_size, facts.st_mtime_ns) != (self.size, self.changed):
                raise CorruptFile(f"{self.path} was changed while it was being loaded; load it again")
            yield descriptor
        finally:
            if descriptor != self._descriptor:
                os.close(descriptor)

    def _chunks(self, offset: int, count: int) -> Iterator[bytes]:
        end = offset + count
        with self._open() as descriptor:
            while offset < end:
                size = min(CHUNK, end - offset)
                try:
                    if KEEP_OPEN:  # threads share the descriptor and its position
                        chunk = os.pread(descriptor, size, offset)
                    else:
                        os.lseek(descriptor, offset, os.SEEK_SET)
                        chunk = os.read(descriptor, size)
                except OSError as error:
                    raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
                if not chunk:
                    return
                yield chunk
                offset += len(chunk)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor whose last axis varies fastest."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides[: len(shape)])


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file. ``strides`` (in elements) are given only where the bytes are not in row-major order."""

    file: StoredFile
    offset: int
    dtype: str  # a name of TYPES
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes that the values take in memory."""
        return self.count * ITEM_SIZES[self.dtype]

    @property
    def span(self) -> int:
        """The number of elements from the first to the last in the file, with those that the strides skip."""
        if self.strides is None or self.count == 0:
            return self.count
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the elements; CorruptFile where the installed torch does not have it."""
        import torch

        dtype: torch.dtype | None = getattr(torch, TORCH_NAMES[self.dtype], None)
        if dtype is None:
            raise CorruptFile(
                f"{self.file.path} stores values as {self.dtype}, which torch {torch.__version__} cannot read; "
                "a newer torch can"
            )
        return dtype

    def read(self, *, brief: bool = False) -> torch.Tensor:
        """The values: the mapped file itself where possible, whose pages are read when they are first accessed.

        Raises:
            CorruptFile: the file was changed or cut short since its header was read, or its type needs another torch.
        """
        import torch

        dtype, size = self.torch_dtype, self.span * ITEM_SIZES[self.dtype]
        if self.count == 0:
            return torch.empty(self.shape, dtype=dtype, device="cpu")
        aligned = self.offset % ITEM_SIZES[self.dtype] == 0  # as torch requires
        mapped = self.file.map(self.offset, size, whole=not brief and self.strides is None) if aligned else None
        if mapped is None:
            raw = torch.empty(size, dtype=torch.uint8, device="cpu")
            self.file.read_into(raw.numpy().data, self.offset)
            values = raw.view(dtype)
        else:
            values = torch.frombuffer(mapped[0], dtype=dtype, count=self.span, offset=mapped[1])
        if self.strides is None:
            return values.reshape(self.shape)
        return values.as_strided(self.shape, self.strides).contiguous()


@dataclasses.dataclass(frozen=True)
class DerivedTensor:
    """A tensor computed from another when it is read; ``change`` must return a tensor of ``shape``."""

    origin: TensorSource
    shape: tuple[int, ...]
    change: Callable[[torch.Tensor], torch.Tensor]

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.origin.torch_dtype

    def read(self, *, brief: bool = False) -> torch.Tensor:
        return self.change(self.origin.read(brief=brief))
