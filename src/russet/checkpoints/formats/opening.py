"""Weight files of every format, opened by what they contain and not by what they are called.

``open_weights`` reads headers only: it says which tensors there are; each is read from disk when it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from russet.checkpoints.formats.safetensors_header import read_header
from russet.checkpoints.formats.tensor_source import Source, StoredTensor
from russet.checkpoints.formats.weight_file import StoredFile
from russet.errors import CorruptFile, UnsafeFile
from russet.file_io import read_json

ZIP_MARK = b"PK\x03\x04"
LEGACY_MARK = b"\x80\x02\x8a\n"  # a pickle whose first object is torch's magic number: torch.save before 1.6


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of one file, or of all shards of one model, by name; ``where`` names it in errors."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    where: str

    @property
    def nbytes(self) -> int:
        """How many bytes the values take in memory, in the types that they are stored in."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_weights(path: Path) -> Weights:
    """Opens one file: safetensors, or a pickle of torch, of which only the tensors are taken.

    Raises:
        MissingFile: it is not there.
        CorruptFile: it is damaged or of no known format.
        UnsafeFile: it is a pickle that wants more than tensors.
    """
    from russet.checkpoints.formats import torch_files

    file = StoredFile.at(path)
    start = file.read_bytes(0, 4)  # as the length of a safetensors header, either mark would be beyond the limit
    if start == ZIP_MARK:
        return Weights(torch_files.read_zip(file), {}, str(path))
    if start == LEGACY_MARK:
        return Weights(torch_files.read_legacy(file), {}, str(path))
    tensors, metadata = read_header(file)
    return Weights(tensors, metadata, str(path))


def open_shards(index: Path) -> Weights:
    """Opens all shards that an index file (``….index.json``) names.

    Raises:
        UnsafeFile: a shard's name leads out of the folder.
        CorruptFile: the index is malformed, or a shard does not hold what the index says.
    """
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CorruptFile(f"{index} has no weight_map of tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(weight_map.values())):
        shard = open_weights(index.parent / plain_name(name, str(index)))
        tensors |= {key: tensor for key, tensor in shard.tensors.items() if weight_map.get(key) == name}
        metadata |= shard.metadata
    if absent := sorted(set(weight_map) - set(tensors)):
        raise CorruptFile(f"{index} places {absent[0]!r} in {weight_map[absent[0]]}, which does not have it")
    return Weights(tensors, metadata, str(index))


def plain_name(name: str, where: str) -> str:
    """``name``, if it is the name of a file in the same folder and no path.

    Raises:
        UnsafeFile: it is a path, or could be taken for one on some system.
    """
    if not name or name in (".", "..") or any(char in name for char in "/\\:\0"):
        raise UnsafeFile(f"{where} names the file {name[:200]!r}; a name without a folder is needed")
    return name


__all__ = ["Source", "Weights", "open_shards", "open_weights", "plain_name"]
