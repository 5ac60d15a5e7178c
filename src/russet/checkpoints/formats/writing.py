"""Weight files written: safetensors and pickles, whole or in shards, a tensor at a time.

A tensor on another device, or in another memory order, is copied only while it is being written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from russet.checkpoints.folder import ClassEntry
from russet.checkpoints.formats.tensor_source import TORCH_NAMES
from russet.errors import ArgumentTypeError, InputError
from russet.file_io import write_json

_DTYPES = {f"torch.{torch_name}": name for name, torch_name in TORCH_NAMES.items()}
ALIGNMENT = 64  # bytes of a cache line, at which a processor's kernels like numbers to begin
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file that can be used in place when it is mapped.

    The data begin at a cache line. The largest elements come first, so that every tensor is aligned to its own, and of
    equal ones those that fill whole cache lines, which are nearly all, so that each of these begins at one too.
    """

    def rank(name: str) -> tuple[int, bool, str]:
        value = tensors[name]
        return -value.element_size(), value.numel() * value.element_size() % ALIGNMENT > 0, name

    order = sorted(tensors, key=rank)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        value = tensors[name]
        start, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": _DTYPES[str(value.dtype)], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            value = tensors[name].detach().cpu().contiguous()
            file.write(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")


def write_weights(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    entry: ClassEntry,
    *,
    variant: str | None,
    max_shard_size: int | str,
    safe_serialization: bool,
) -> None:
    """Writes a model's weights under the names that Diffusers and transformers look for."""
    extension = "safetensors" if safe_serialization else "bin"
    stem = ".".join(part for part in (entry.stems[extension], variant) if part)
    shards = list(_shards(tensors, read_size(max_shard_size)))
    if len(shards) == 1:
        _write(folder / f"{stem}.{extension}", shards[0])
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.{extension}"
        _write(folder / name, names)
        places |= dict.fromkeys(names, name)
    index = ".".join(part for part in (entry.stems[extension], extension, "index", variant, "json") if part)
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": places})


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, {"format": "pt"})
    else:
        torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def _shards(tensors: Mapping[str, torch.Tensor], limit: int) -> Iterable[dict[str, torch.Tensor]]:
    """Groups of at most ``limit`` bytes, in order; a tensor that is larger has a group of its own."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, value in tensors.items():
        nbytes = value.numel() * value.element_size()
        if shard and size + nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = value
        size += nbytes
    yield shard


def read_size(size: int | str) -> int:
    """A number of bytes, given as such or as a text such as "10GB" or "512MiB".

    Raises:
        ArgumentTypeError, InputError: it is neither.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"(\d{1,12})\s*([KMG]I?B)?", size.strip().upper())
        if match is None:
            raise InputError(f'max_shard_size must be bytes or a text such as "10GB", not {size!r}')
        size = int(match[1]) * _UNITS[match[2] or ""]
    if not isinstance(size, int) or isinstance(size, bool):
        raise ArgumentTypeError(f"max_shard_size must be a whole number or a text, not {type(size).__name__}")
    if size <= 0:
        raise InputError(f"max_shard_size must be positive, not {size}")
    return size
