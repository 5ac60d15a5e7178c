"""A checkpoint folder in Diffusers form: model_index.json, and a folder for each component with config and weights."""

from __future__ import annotations

import dataclasses
import logging
import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from russet.checkpoints import weight_names
from russet.checkpoints.classes import COMPONENTS, TABLE, Entry, find
from russet.checkpoints.formats.opening import Weights, open_shards, open_weights
from russet.checkpoints.weight_names import Choice
from russet.errors import ConfigError, MissingFile, UnsafeFile
from russet.file_io import read_json

log = logging.getLogger(__name__)

INDEX = "model_index.json"
_NAME = re.compile(r"\w{1,100}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Index:
    """What model_index.json says: the pipeline's class, and for each component the name of its class or None."""

    class_name: str
    parts: Mapping[str, str | None]
    raw: Mapping[str, Any]
    where: str

    def entries(self, skipped: Collection[str]) -> dict[str, Entry]:
        """The components to be loaded, with their classes; ``skipped`` are provided by the caller.

        Raises:
            ConfigError: a class that Russet does not have.
        """
        return {
            part: find(name, f"{self.where}, {part}")
            for part, name in self.parts.items()
            if name is not None and part not in skipped
        }


def read_index(folder: Path) -> Index:
    """Reads and checks model_index.json.

    Raises:
        MissingFile: there is none; the error says what the folder seems to be instead.
        ConfigError: it is not what a model_index.json has to be.
        UnsafeFile: a component's name is a path.
    """
    path = folder / INDEX
    if not path.is_file():
        raise MissingFile(f"{folder} has no {INDEX}{_instead(folder)}")
    return parse_index(read_json(path), str(path))


def parse_index(raw: Mapping[str, Any], where: str) -> Index:
    """Checks the content of a model_index.json; raises as ``read_index`` does."""
    class_name = raw.get("_class_name")
    if not isinstance(class_name, str):
        raise ConfigError(f"{where} has no _class_name, the name of a pipeline")
    parts: dict[str, str | None] = {}
    for part, value in raw.items():
        if part.startswith("_") or not isinstance(value, list):
            continue  # a setting of the pipeline
        if not _NAME.fullmatch(part):
            raise UnsafeFile(f"{where} has a component {part[:200]!r}; the name of a folder in it is needed")
        if len(value) == 2 and all(item is None or isinstance(item, str) for item in value):
            parts[part] = value[1]
        elif part in COMPONENTS:
            raise ConfigError(f"{where}: {part} must be [library, class] or [null, null], not {reprlib.repr(value)}")
    if not any(parts.values()):
        raise ConfigError(f"{where} names no component")
    return Index(class_name, parts, raw, where)


def find_weights(folder: Path, entry: Entry, variant: str | None, use_safetensors: bool | None) -> Choice:
    """The weight files of one component.

    Raises:
        MissingFile: there are none of the kind asked for; the error says which there are.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    choice = weight_names.choose(names, entry.stems, variant, use_safetensors)
    if choice is None:
        raise MissingFile(f"{folder} {no_weights(names, entry, use_safetensors)}")
    return choice


def no_weights(names: Collection[str], entry: Entry, use_safetensors: bool | None) -> str:
    """Why no weights were found among ``names``, as the end of a sentence."""
    wanted = [f"{stem}.{extension}" for extension, stem in entry.stems.items()]
    if found := weight_names.variants(names, entry.stems):
        return f"has weights only as a variant; pass variant={' or '.join(repr(name) for name in sorted(found))}"
    if use_safetensors is not None and weight_names.choose(names, entry.stems, None, None):
        return f"has no {wanted[0] if use_safetensors else wanted[1]}; leave out use_safetensors={use_safetensors}"
    return f"has no weights: looked for {' and '.join(wanted)}, whole or in shards"


def check_variant(choices: Mapping[str, Choice], variant: str | None, where: object) -> None:
    """Reports components that lack the variant.

    Raises:
        MissingFile: none has it; the error says which variants there are.
    """
    lacking = sorted(part for part, choice in choices.items() if choice.variant != variant)
    if lacking and len(lacking) == len(choices):
        found = sorted(frozenset().union(*(choice.variants for choice in choices.values())))
        there = f"there are {', '.join(found)}" if found else "there is none; leave out variant="
        raise MissingFile(f"{where} has no weights of the variant {variant!r}; {there}")
    if lacking:
        log.info("%s: no variant %r of %s; using the plain files there", where, variant, ", ".join(lacking))


def open_component(folder: Path, choice: Choice) -> Weights:
    """Reads the headers of a component's weight files."""
    path = folder / choice.first
    return open_shards(path) if choice.sharded else open_weights(path)


def check_class(entry: Entry, config: Mapping[str, Any], where: str) -> None:
    """Compares the class that was asked for with the one that a model's config names.

    Raises:
        ConfigError: they are different networks.
    """
    names = config.get("_class_name") if entry.library == "diffusers" else config.get("architectures")
    given = names if isinstance(names, list) else [names]
    known = {name for name in given if isinstance(name, str) and name in TABLE}
    if known and entry.name not in known:
        raise ConfigError(f"{where} is the config of a {', '.join(sorted(known))}, not of a {entry.name}")


def _instead(folder: Path) -> str:
    """A hint at what a folder without model_index.json is."""
    names = {path.name for path in folder.iterdir()}
    if names & {"config.json", "scheduler_config.json"}:
        return ": it is a single component; load it with the from_pretrained of its class"
    if singles := sorted(name for name in names if name.endswith((".safetensors", ".ckpt"))):
        return f"; load a single file such as {singles[0]} with from_single_file"
    if parts := sorted(path.name for path in folder.iterdir() if (path / INDEX).is_file()):
        return f"; the folder {parts[0]} in it has one"
    return ": it is not a pipeline in Diffusers form"
