"""Components and pipelines written in the folder form that Diffusers reads.

Everything is written into a hidden folder beside its goal and moved into place when it is complete: a full disk, a
missing permission or Ctrl-C leaves what stood there before.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from russet.checkpoints.arguments import Options
from russet.checkpoints.atomic_directory import atomic_directory
from russet.checkpoints.folder import INDEX, ClassEntry, entry_of
from russet.checkpoints.formats.weight_files import is_weight_file
from russet.checkpoints.formats.writing import read_size, write_weights
from russet.errors import ArgumentTypeError
from russet.file_io import write_json

# The Diffusers whose folder form this is; it goes by this where a config says nothing else.
DIFFUSERS_VERSION = "0.42.1"


def pipeline(
    folder: str | os.PathLike[str],
    class_name: str,
    components: Mapping[str, Any],
    index: Mapping[str, Any],
    *,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
) -> None:
    """Writes a pipeline: model_index.json, and a folder for each component that is not None.

    Args:
        index: the model_index.json that the pipeline came from, if any; what it says beyond components is kept.
        variant: goes into the names of the weight files (``….VARIANT.safetensors``).
        max_shard_size: bytes, or a text such as "10GB"; models beyond it are cut into several files.
        safe_serialization: safetensors; False writes pickles (.bin).

    Raises:
        InputError: an argument has a wrong type or value.
        CheckpointError: it cannot be written; what stood there before is intact.
    """
    settings = _Settings(variant, read_size(max_shard_size), safe_serialization)
    entries = {part: entry_of(type(value)) for part, value in components.items() if value is not None}
    data = {"_diffusers_version": DIFFUSERS_VERSION, **index, "_class_name": class_name}
    for part in components:
        data[part] = [entries[part].library, entries[part].name] if part in entries else [None, None]
    goal = _folder(folder)
    with atomic_directory(goal, sum(_size(value) for value in components.values())) as temporary:
        for part, entry in entries.items():
            (temporary / part).mkdir()
            _write(components[part], entry, temporary / part, settings)
        write_json(temporary / INDEX, data)
        written = {part: _names(temporary / part) for part in entries}
    for part, entry in entries.items():
        _tidy(goal / part, entry, variant, written[part])


def component(
    part: Any,
    folder: str | os.PathLike[str],
    *,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
) -> None:
    """Writes one component; arguments and errors are those of ``pipeline``."""
    settings = _Settings(variant, read_size(max_shard_size), safe_serialization)
    entry = entry_of(type(part))
    goal = _folder(folder)
    with atomic_directory(goal, _size(part)) as temporary:
        _write(part, entry, temporary, settings)
        written = _names(temporary)
    _tidy(goal, entry, variant, written)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """How weights are written; checked like the options of loading, whose names they share."""

    variant: str | None
    max_shard_size: int
    safe_serialization: bool

    def __post_init__(self) -> None:
        Options(variant=self.variant)
        if not isinstance(self.safe_serialization, bool):
            raise ArgumentTypeError(f"safe_serialization must be a bool, not {type(self.safe_serialization).__name__}")


def _write(part: Any, entry: ClassEntry, folder: Path, settings: _Settings) -> None:
    if entry.kind in ("tokenizer", "processor"):
        part.save(folder)
        return
    write_json(folder / entry.config_file, config_data(part, entry))
    if isinstance(part, nn.Module):
        write_weights(
            folder,
            part.state_dict(),
            entry,
            variant=settings.variant,
            max_shard_size=settings.max_shard_size,
            safe_serialization=settings.safe_serialization,
        )


def config_data(part: Any, entry: ClassEntry) -> dict[str, Any]:
    """The content of a component's JSON file: what was read from one, with the class as it is now."""
    data = part.config.to_dict()
    if entry.library == "diffusers":
        return {"_diffusers_version": DIFFUSERS_VERSION, **data, "_class_name": entry.name}
    # Recent transformers write the precision as "dtype" and read either name, older ones know only "torch_dtype".
    precision = str(part.dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in data] or ["torch_dtype"]
    return {"model_type": entry.model_type, **data, "architectures": [entry.name], **dict.fromkeys(keys, precision)}


def _folder(folder: str | os.PathLike[str]) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise ArgumentTypeError(f"a folder to save into must be a text or a path, not {folder!r}")
    return Path(folder)


def _size(part: Any) -> int:
    """How many bytes a component takes on disk, near enough: its weights."""
    if not isinstance(part, nn.Module):
        return 0
    return sum(value.numel() * value.element_size() for value in part.state_dict().values())


def _names(folder: Path) -> frozenset[str]:
    return frozenset(path.name for path in folder.iterdir())


def _tidy(folder: Path, entry: ClassEntry, variant: str | None, written: Collection[str]) -> None:
    """Removes weights of an earlier save under other names (shards, a pickle), which would be read instead."""
    if entry.kind == "model":
        for path in folder.iterdir():
            if path.name not in written and is_weight_file(path.name, entry.stems, variant):
                path.unlink()
