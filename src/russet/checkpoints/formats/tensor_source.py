"""Tensors on disk: where their bytes lie, and how they come into memory.

A ``StoredTensor`` is what a header says about one tensor; nothing is read until ``read()``. A ``Derived`` tensor is
made from another one on the way (a squeeze, a third of a fused matrix). Both are ``Source``: a shape and a ``read()``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from russet.checkpoints.formats.weight_file import StoredFile
from russet.errors import CorruptFile

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


class Source(Protocol):
    """A tensor that can be had: its shape and type now, its values when they are wanted."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def torch_dtype(self) -> torch.dtype: ...

    def read(self, *, brief: bool = False) -> torch.Tensor:
        """The values, on the CPU, to be written to as one likes.

        Args:
            brief: they are copied at once, so that their place in memory can go as soon as this tensor does.
        """


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

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of its elements.

        Raises:
            CorruptFile: the installed torch does not have it.
        """
        import torch

        dtype: torch.dtype | None = getattr(torch, TORCH_NAMES[self.dtype], None)
        if dtype is None:
            raise CorruptFile(
                f"{self.file.path} stores values as {self.dtype}, which torch {torch.__version__} cannot read; "
                "a newer torch can"
            )
        return dtype

    def read(self, *, brief: bool = False) -> torch.Tensor:
        """The values: where that can be, the file itself as memory, whose pages are read when they are first touched.

        Raises:
            CorruptFile: the file was changed or cut short since its header was read, or its type needs another torch.
        """
        import torch

        if self.count == 0:
            return torch.empty(self.shape, dtype=self.torch_dtype, device="cpu")
        values = self._mapped(brief=brief)
        if values is None:
            raw = torch.empty(self.span * ITEM_SIZES[self.dtype], dtype=torch.uint8, device="cpu")
            self.file.read_into(raw.numpy().data, self.offset)
            values = raw.view(self.torch_dtype)
        if self.strides is None:
            return values.reshape(self.shape)
        return values.as_strided(self.shape, self.strides).contiguous()

    def _mapped(self, *, brief: bool) -> torch.Tensor | None:
        """The elements in the file's order, without a copy; None where they have to be copied."""
        import torch

        if self.offset % ITEM_SIZES[self.dtype]:  # torch wants them aligned
            return None
        if brief or self.strides is not None:
            part = self.file.mapped_part(self.offset, self.span * ITEM_SIZES[self.dtype])
        else:
            memory = self.file.mapped()
            part = None if memory is None else (memory, self.offset)
        if part is None:
            return None
        return torch.frombuffer(part[0], dtype=self.torch_dtype, count=self.span, offset=part[1])


@dataclasses.dataclass(frozen=True)
class Derived:
    """A tensor made from another when it is read; ``change`` must give a tensor of ``shape``."""

    origin: Source
    shape: tuple[int, ...]
    change: Callable[[torch.Tensor], torch.Tensor]

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.origin.torch_dtype

    def read(self, *, brief: bool = False) -> torch.Tensor:
        return self.change(self.origin.read(brief=brief))
