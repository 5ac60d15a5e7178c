"""The safetensors header, checked before anything is allocated from it.

Format (github.com/huggingface/safetensors): 8 bytes with the header's length, little-endian; the header, a JSON object
``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}``; then the data, which the
tensors must cover without gap or overlap. A header is a stranger's text: every number in it is doubted.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from russet.checkpoints.formats.tensor_source import ITEM_SIZES, RANK_LIMIT, StoredTensor
from russet.checkpoints.formats.weight_file import StoredFile
from russet.errors import CorruptFile
from russet.file_io import parse_json

HEADER_LIMIT = 32 << 20  # bytes; the header of a full SDXL file has 0.4 MB


def read_header(file: StoredFile) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    Raises:
        CorruptFile: the file is not safetensors, or its header does not describe its data.
    """
    start = file.read_bytes(0, 8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > file.size - 8 or length < 2:
        raise CorruptFile(_not_safetensors(file, f"it says that its header has {length} bytes"))
    if length > HEADER_LIMIT:
        raise CorruptFile(f"{file.path}: its header has {length} bytes; more than {HEADER_LIMIT} are refused")
    data = parse_json(file.read_bytes(8, length), str(file.path), unique=True)
    if not isinstance(data, dict):
        raise CorruptFile(_not_safetensors(file, "its header is not a JSON object"))
    metadata = data.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFile(f"{file.path}: the metadata in its header must be texts")
    tensors = {name: _tensor(file, name, entry, 8 + length) for name, entry in data.items()}
    _check_cover(file, tensors, 8 + length)
    return tensors, metadata


def _tensor(file: StoredFile, name: str, entry: Any, base: int) -> StoredTensor:
    def refuse(what: str) -> CorruptFile:
        return CorruptFile(f"{file.path}: {what} of tensor {name[:200]!r} cannot be right: {reprlib.repr(entry)}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("the description")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise refuse("the type")
    if not isinstance(shape, list) or len(shape) > RANK_LIMIT or not all(_is_size(size) for size in shape):
        raise refuse("the shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise refuse("the place")
    tensor = StoredTensor(file, base + offsets[0], dtype, tuple(shape))
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise refuse("the length")
    return tensor


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _check_cover(file: StoredFile, tensors: Mapping[str, StoredTensor], base: int) -> None:
    """The tensors must fill the rest of the file exactly, one after the other."""
    end = base
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise CorruptFile(f"{file.path}: its tensors overlap or leave a gap at byte {end}")
        end += tensor.nbytes
    if end > file.size:
        raise CorruptFile(
            f"{file.path} is cut short: its header promises {end} bytes, the file has {file.size}; download it again"
        )
    if end < file.size:
        raise CorruptFile(f"{file.path} has {file.size - end} bytes after its last tensor")


def _not_safetensors(file: StoredFile, why: str) -> str:
    return file.placeholder() or f"{file.path} is not a safetensors file: {why}, and the file has {file.size} bytes"
