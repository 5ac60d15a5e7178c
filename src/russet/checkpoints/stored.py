"""Tensors on disk: where their bytes lie, and how they come into memory.

A ``StoredTensor`` is what a header says about one tensor; nothing is read until ``read()``. A ``Derived`` tensor is
made from another one on the way (a squeeze, a third of a fused matrix). Both are ``Source``: a shape and a ``read()``.
"""

from __future__ import annotations

import dataclasses
import io
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from russet.errors import CheckpointError, CorruptFile, MissingFile

if TYPE_CHECKING:
    import torch

# Bytes per element, by the names that the safetensors format gives to types.
ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}

# The same names in torch; a type that the installed torch lacks is refused when a tensor of it is read.
TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}


RANK_LIMIT = 8  # dimensions of a tensor; convolution weights have four
LFS_MARK = b"version https://git-lfs"


_MAPPED: weakref.WeakValueDictionary[StoredFile, mmap.mmap] = weakref.WeakValueDictionary()
_MAPPING = threading.Lock()


class Source(Protocol):
    """A tensor that can be had: its shape now, its values when they are wanted."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> torch.Tensor:
        """The values, on the CPU, in memory of their own."""


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file as it was when its header was read, so that a later change is noticed instead of believed."""

    path: Path
    size: int
    changed: int  # nanoseconds
    settled: bool  # in huggingface_hub's cache, whose files carry their hash as a name and are never written into

    @classmethod
    def at(cls, path: Path) -> StoredFile:
        """Looks at a file without opening it.

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
        settled = path.is_symlink() and path.resolve().parent.name == "blobs"
        return cls(path, facts.st_size, facts.st_mtime_ns, settled)

    def open(self) -> io.FileIO:
        """Opens the file for unbuffered reading.

        Raises:
            MissingFile: it is gone, or may not be read.
            CorruptFile: it is no longer the file whose header was read.
        """
        try:
            file = io.FileIO(self.path)
        except OSError as error:
            raise MissingFile(f"{self.path} cannot be opened: {error.strerror or error}") from None
        facts = os.fstat(file.fileno())
        if (facts.st_size, facts.st_mtime_ns) != (self.size, self.changed):
            file.close()
            raise CorruptFile(f"{self.path} was changed while it was being loaded; load it again")
        return file

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fills ``memory`` with the bytes at ``offset``: one copy, from the page cache to where they will stay."""
        with self.open() as file:
            file.seek(offset)
            done = 0
            while done < len(memory):  # one call returns at most 2 GiB
                try:
                    count = file.readinto(memory[done:])
                except OSError as error:
                    raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
                if not count:
                    raise CorruptFile(f"{self.path} ends too early: it was cut short while it was being loaded")
                done += count

    def mapped(self) -> mmap.mmap:
        """The whole file as memory, shared with the page cache until it is written to; one mapping while it is used."""
        with _MAPPING:
            memory = _MAPPED.get(self)
            if memory is None:
                with self.open() as file:
                    memory = _MAPPED[self] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return memory

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

    def read_bytes(self, offset: int, count: int) -> bytes:
        """``count`` bytes at ``offset``; fewer where the file ends."""
        with self.open() as file:
            file.seek(offset)
            return file.read(count)


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
    dtype: str  # a name of ITEM_SIZES
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """How many elements the tensor has."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def nbytes(self) -> int:
        """How many bytes its values take in memory."""
        return self.count * ITEM_SIZES[self.dtype]

    @property
    def span(self) -> int:
        """How many elements lie from the first to the last one, counting those that the strides skip."""
        if self.strides is None or self.count == 0:
            return self.count
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    def read(self) -> torch.Tensor:
        """The values, in memory of their own: the file may change or go away afterwards.

        The files of huggingface_hub's cache do not change, so from there they are not even copied: the memory is the
        page cache's. Elsewhere a file that is rewritten in place would pull the memory away from under the model, and
        the process would die of it.

        Raises:
            CorruptFile: the file was changed or cut short since its header was read, or its type needs another torch.
        """
        import torch

        dtype = getattr(torch, TORCH_NAMES[self.dtype], None)
        if dtype is None:
            raise CorruptFile(
                f"{self.file.path} stores values as {self.dtype}, which torch {torch.__version__} cannot read; "
                "a newer torch can"
            )
        if self.count == 0:
            return torch.empty(self.shape, dtype=dtype)
        if self.file.settled and self.offset % ITEM_SIZES[self.dtype] == 0:
            values = torch.frombuffer(self.file.mapped(), dtype=dtype, count=self.span, offset=self.offset)
        else:
            raw = torch.empty(self.span * ITEM_SIZES[self.dtype], dtype=torch.uint8)
            self.file.read_into(raw.numpy().data, self.offset)
            values = raw.view(dtype)
        if self.strides is None:
            return values.reshape(self.shape)
        return values.as_strided(self.shape, self.strides).contiguous()


@dataclasses.dataclass(frozen=True)
class Derived:
    """A tensor made from another when it is read; ``change`` must give a tensor of ``shape``."""

    origin: Source
    shape: tuple[int, ...]
    change: Callable[[torch.Tensor], torch.Tensor]

    def read(self) -> torch.Tensor:
        return self.change(self.origin.read())
