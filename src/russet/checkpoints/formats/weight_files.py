"""Weight files of every format: chosen by their names, opened by what they contain; only headers are read.

With stem S, extension E (safetensors or bin) and variant V, the weight files found in the wild are::

    S.E                         S.V.E                         one file
    S-00001-of-00002.E          S.V-00001-of-00002.E          shards; legacy: S-00001-of-00002.V.E
    S.E.index.json              S.E.index.V.json              their index; legacy: S.E.V.index.json

The safetensors format (github.com/huggingface/safetensors): 8 bytes with the header's length, little-endian; the
header, a JSON object ``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}``; then the
data, which the tensors must cover without gap or overlap. A header may be hostile: every number in it is checked before
anything is allocated from it.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from russet.checkpoints.formats.tensor_source import ITEM_SIZES, LFS_MARK, RANK_LIMIT, StoredFile, StoredTensor
from russet.errors import CorruptFile, MissingFile, UnsafeFile
from russet.file_io import parse_json, read_json

log = logging.getLogger(__name__)

_SHARD = re.compile(r"-\d{5}-of-\d{5}")
ZIP_MARK = b"PK\x03\x04"
LEGACY_MARK = b"\x80\x02\x8a\n"  # a pickle whose first object is torch's magic number: torch.save before 1.6
HEADER_LIMIT = 32 << 20  # bytes; the header of a full SDXL file has 0.4 MB


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The files that hold a component's weights: one, or the index of shards and the shards.

    ``variant`` is the one that they belong to, ``variants`` are all that there are files of.
    """

    files: tuple[str, ...]
    variant: str | None
    variants: frozenset[str] = frozenset()

    def open(self, folder: Path) -> Weights:
        """Opens the files in ``folder``."""
        path = folder / self.files[0]
        return open_shards(path) if path.suffix == ".json" else open_weights(path)


def choose_weight_files(
    names: Collection[str], stems: Mapping[str, str], variant: str | None, use_safetensors: bool | None, where: str
) -> WeightFiles:
    """The files to read among ``names``, those of the component's folder ``where``; MissingFile where there are none.

    The variant comes before the plain files, safetensors before pickles (``use_safetensors`` allows only one of the
    two), one file before shards. ``stems``: extension → how the names of the component's weight files begin.
    """
    if chosen := _choose(names, stems, variant, use_safetensors):
        return chosen
    raise MissingFile(f"{where} {_why_none(names, stems, use_safetensors)}")


def _choose(
    names: Collection[str], stems: Mapping[str, str], variant: str | None, use_safetensors: bool | None
) -> WeightFiles | None:
    extensions = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]
    for wanted in dict.fromkeys((variant, None)):
        for extension in extensions:
            single, indexes = _spellings(stems[extension], extension, wanted)
            if single in names:
                return WeightFiles((single,), wanted, variants_of(names, stems))
            if index := next((name for name in indexes if name in names), None):
                shards = sorted(name for name in names if _SHARD.search(name) and _SHARD.sub("", name) == single)
                return WeightFiles((index, *shards), wanted, variants_of(names, stems))
    return None


def _why_none(names: Collection[str], stems: Mapping[str, str], use_safetensors: bool | None) -> str:
    plain = [f"{stem}.{extension}" for extension, stem in stems.items()]
    if variants := variants_of(names, stems):
        return f"has weights only as a variant; pass variant={' or '.join(map(repr, sorted(variants)))}"
    if use_safetensors is not None and _choose(names, stems, None, None):
        return f"has no {plain[0] if use_safetensors else plain[1]}; leave out use_safetensors={use_safetensors}"
    return f"has no weights: looked for {' and '.join(plain)}, whole or in shards"


def _spellings(stem: str, extension: str, variant: str | None) -> tuple[str, tuple[str, ...]]:
    """The name of weights in one file, and the names that the index of their shards may have."""
    full = f"{stem}.{extension}"
    if variant is None:
        return full, (f"{full}.index.json",)
    return f"{stem}.{variant}.{extension}", (f"{full}.index.{variant}.json", f"{full}.{variant}.index.json")


def variants_of(names: Collection[str], stems: Mapping[str, str]) -> frozenset[str]:
    """The variants that there are weight files of."""
    patterns = [rf"{re.escape(stem)}\.(\w+)\.{extension}" for extension, stem in stems.items()]
    matches = (re.fullmatch(pattern, _SHARD.sub("", name)) for name in names for pattern in patterns)
    return frozenset(match[1] for match in matches if match)


def is_weight_file(name: str, stems: Mapping[str, str], variant: str | None) -> bool:
    """Whether a file is weights, a shard or an index of this variant, in either format."""
    spellings = (_spellings(stem, extension, variant) for extension, stem in stems.items())
    return any(name in indexes or _SHARD.sub("", name) == single for single, indexes in spellings)


def check_variant(chosen: Mapping[str, WeightFiles], variant: str | None, where: object) -> None:
    """Logs which components lack the variant; MissingFile, with the variants that there are, if all do."""
    lacking = sorted(part for part, files in chosen.items() if files.variant != variant)
    if lacking and len(lacking) == len(chosen):
        found = sorted(frozenset().union(*(files.variants for files in chosen.values())))
        there = f"there are {', '.join(found)}" if found else "there is none; leave out variant="
        raise MissingFile(f"{where} has no weights of the variant {variant!r}; {there}")
    if lacking:
        log.info("%s: no variant %r of %s; using the plain files there", where, variant, ", ".join(lacking))


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of one file, or of all shards of one model, by name; ``where`` names it in errors."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    where: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def open_weights(path: Path) -> Weights:
    """Opens one file: safetensors, or a pickle of torch, from which only the tensors are taken.

    Raises:
        MissingFile: it is not there.
        CorruptFile: it is damaged or of no known format.
        UnsafeFile: it is a pickle that needs more than tensors.
    """
    file = StoredFile.at(path)
    start = file.read_bytes(0, 8)  # read as the length of a safetensors header, either mark is beyond the limit
    if start.startswith((ZIP_MARK, LEGACY_MARK)):
        from russet.checkpoints.formats import torch_files

        read = torch_files.read_zip if start.startswith(ZIP_MARK) else torch_files.read_legacy
        return Weights(read(file), {}, str(path))
    return Weights(*_read_safetensors(file, start), str(path))


def open_shards(index: Path) -> Weights:
    """Opens all shards that an index file (``….index.json``) names.

    Raises:
        UnsafeFile: a shard's name leads out of the folder.
        CorruptFile: the index is malformed, or a shard does not hold what the index says.
    """
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not isinstance(weight_map, dict) or not names or not all(isinstance(name, str) for name in names):
        raise CorruptFile(f"{index} has no weight_map of tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(names)):
        # Also refused: what could be a path on another system.
        if not name or name in (".", "..") or any(char in name for char in "/\\:\0"):
            raise UnsafeFile(f"{index} names the file {name[:200]!r}; a name without a folder is needed")
        shard = open_weights(index.parent / name)
        tensors |= {key: tensor for key, tensor in shard.tensors.items() if weight_map.get(key) == name}
        metadata |= shard.metadata
    if absent := sorted(set(weight_map) - set(tensors)):
        raise CorruptFile(f"{index} places {absent[0]!r} in {weight_map[absent[0]]}, which does not have it")
    return Weights(tensors, metadata, str(index))


def _read_safetensors(file: StoredFile, start: bytes) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata; ``start`` is its first 8 bytes."""
    length = int.from_bytes(start, "little")
    base = 8 + length  # where the data begin
    if base > file.size or length < 2:
        raise _not_safetensors(file, f"it says that its header has {length} bytes")
    if length > HEADER_LIMIT:
        raise CorruptFile(f"{file.path}: its header has {length} bytes; more than {HEADER_LIMIT} are refused")
    data = parse_json(file.read_bytes(8, length), str(file.path), unique=True)
    if not isinstance(data, dict):
        raise _not_safetensors(file, "its header is not a JSON object")
    metadata = data.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFile(f"{file.path}: the metadata in its header must be texts")
    tensors = {name: _safetensors_entry(file, name, entry, base) for name, entry in data.items()}
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
    return tensors, metadata


def _safetensors_entry(file: StoredFile, name: str, entry: Any, base: int) -> StoredTensor:
    """One tensor of a header, all its values checked."""

    def is_size(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 62

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad_entry(file, name, entry, "the description")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise _bad_entry(file, name, entry, "the type")
    if not isinstance(shape, list) or len(shape) > RANK_LIMIT or not all(map(is_size, shape)):
        raise _bad_entry(file, name, entry, "the shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise _bad_entry(file, name, entry, "the place")
    tensor = StoredTensor(file, base + offsets[0], dtype, tuple(shape))
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise _bad_entry(file, name, entry, "the length")
    return tensor


def _bad_entry(file: StoredFile, name: str, entry: Any, what: str) -> CorruptFile:
    return CorruptFile(f"{file.path}: {what} of tensor {name[:200]!r} cannot be right: {reprlib.repr(entry)}")


def _not_safetensors(file: StoredFile, why: str) -> CorruptFile:
    if file.size == 0:
        return CorruptFile(f"{file.path} is empty; download it again")
    if file.read_bytes(0, len(LFS_MARK)) == LFS_MARK:
        return CorruptFile(
            f"{file.path} is a git-lfs pointer, not the file itself; "
            "run `git lfs pull` in its folder, or download the file"
        )
    return CorruptFile(f"{file.path} is not a safetensors file: {why}, and the file has {file.size} bytes")
