"""A pipeline's components, or one component, loaded from wherever they are.

Everything that can be known without the weights is checked first: the index, the classes, every config, the headers of
every weight file, and that names and shapes fit. Only then is the first byte of a weight read.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from torch import nn

from russet.checkpoints import folder
from russet.checkpoints.arguments import Options, Precision, locate, precision_of, read_dtype
from russet.checkpoints.folder import COMPONENTS, ClassEntry, entry_of
from russet.checkpoints.formats import tensor_source
from russet.checkpoints.formats.tensor_source import TensorSource
from russet.checkpoints.formats.weight_files import WeightFiles, check_variant, choose_weight_files
from russet.checkpoints.layouts import old_checkpoints
from russet.checkpoints.load_state_dict import build, check, load_state_dict
from russet.errors import ArgumentTypeError, ConfigError, MissingFile, UnsafeFile, UnsupportedArgument
from russet.file_io import read_json

log = logging.getLogger(__name__)

T = TypeVar("T")

EXTRA_TENSORS = 2000  # that a model may have beyond those in its file, so that the error can list what is missing


@dataclasses.dataclass(frozen=True)
class PendingWeights:
    """A component whose weights are not read yet: the component itself, and for a model the sources of its tensors."""

    component: Any
    where: str
    files: WeightFiles | None = None
    sources: Mapping[str, TensorSource] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(
        cls,
        target: type[Any],
        entry: ClassEntry,
        place: Path,
        options: Options,
        *,
        repair: bool = False,
        dtype: torch.dtype | None = None,
    ) -> PendingWeights:
        """Makes a component from its folder ``place``; of a model's weights only the headers are read.

        Args:
            target: the class to make: that of ``entry`` or a subclass.
            repair: whether known faults of old configs are repaired.
            dtype: of a model's parameters until its weights are read.
        """
        if entry.kind in ("tokenizer", "processor"):
            return cls(target.from_files(place), str(place))
        where = str(place / entry.config_file)
        data = read_json(place / entry.config_file)
        if entry.kind == "model":
            folder.check_class(entry, data, where)
        config = target.config_class.from_dict(data, where)
        if repair:
            config = old_checkpoints.repaired(config, where)
        if entry.kind == "scheduler":
            return cls(target(config), str(place))
        names = {path.name for path in place.iterdir()}
        files = choose_weight_files(names, entry.stems, options.variant, options.use_safetensors, str(place))
        weights = files.open(place)
        try:
            model = build(target, config, limit=len(weights.tensors) + EXTRA_TENSORS, dtype=dtype)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        sources: Mapping[str, TensorSource] = weights.tensors
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        if weights.shapes != wanted:
            sources = old_checkpoints.renamed(sources, wanted)
        check(model, sources, weights.where)
        return cls(model, str(place), files, sources)

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
        """The component, complete: a model in ``dtype`` on ``device``."""
        if self.sources:
            load_state_dict(self.component, self.sources, self.where, dtype=dtype, device=device)
        return self.component

    def for_reloading(self) -> PendingWeights:
        """The same without the component, which would be kept alive otherwise."""
        return dataclasses.replace(self, component=None)

    def refill(
        self, network: nn.Module, *, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> None:
        """Reads the weights into a network that has none, or has lost them."""
        load_state_dict(network, self.sources, self.where, dtype=dtype, device=device, memory_format=memory_format)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A pipeline's parts: ``components`` by name, None for those that it does without; ``index`` as it was read.

    ``pending`` has for each network what reads its weights, for the first time or again:
    ``pending[network].refill(network, …)``.
    """

    class_name: str
    components: Mapping[str, Any]
    index: Mapping[str, Any]
    source: str
    pending: Mapping[Any, PendingWeights] = dataclasses.field(default_factory=dict)


def pipeline(
    source: str | os.PathLike[str],
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: Precision = None,
    options: Options | None = None,
    device: torch.device | str = "cpu",
    postponed: bool = False,
) -> Loaded:
    """Loads all components of a pipeline.

    Args:
        source: "mini", a folder in Diffusers form, or a Hub id.
        overrides: components to use as they are, instead of the checkpoint's; None leaves one out.
        dtype: of the weights of all models, or of each by its component's name ("default" for the others); None is
            float32.
        options: how to find the files.
        device: where the weights go, tensor by tensor, without the whole model being on the CPU first.
        postponed: leaves networks without memory, for their weights to be read later; has no effect where files cannot
            be kept open.

    Raises:
        InputError: an argument has a wrong value, or an override names no component.
        CheckpointError: the checkpoint is missing, damaged, unsafe, or does not fit its configs.
        ConfigError: a config cannot be built, or names a class that Russet does not have.
    """
    overrides, options = dict(overrides or {}), options or Options()
    place = locate(source)
    if isinstance(place, str):
        from russet.checkpoints.hub import download

        place = download.fetch_pipeline(place, options, skipped=overrides)
    index = folder.read_index(place)
    check_overrides(overrides, index.parts)
    started = time.perf_counter()
    repair = old_checkpoints.repairs_apply(index.class_name)
    precisions = {part: precision_of(dtype, part) for part in index.parts}
    pending = {
        part: PendingWeights.read(entry.load(), entry, place / part, options, repair=repair, dtype=precisions[part])
        for part, entry in index.entries(skipped=overrides).items()
    }
    chosen = {part: weights.files for part, weights in pending.items() if weights.files is not None}
    check_variant(chosen, options.variant, place)
    postponed = postponed and tensor_source.KEEP_OPEN
    made = {
        part: weights.component if postponed else weights.make(precisions[part], device)
        for part, weights in pending.items()
    }
    done = "opened" if postponed else "loaded"
    log.info("%s: %s %s in %.2f s", source, done, ", ".join(made), time.perf_counter() - started)
    components = {part: made.get(part) for part in index.parts} | overrides
    readers = {made[part]: weights for part, weights in pending.items() if weights.sources}
    return Loaded(index.class_name, components, index.raw, os.fspath(source), readers)


def component(
    cls: type[T],
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> T:
    """Loads one component, on the CPU.

    Args:
        cls: its class: a model, a scheduler, ``CLIPTokenizer`` or ``CLIPImageProcessor``.
        source: a folder or a Hub id.
        subfolder: where in it the component lies, for example "vae" in a pipeline's folder.
        torch_dtype, dtype: of a model's weights; None is float32.
        options: the fields of ``Options``.

    Raises:
        InputError: an argument has a wrong value or is unknown.
        CheckpointError: the files are missing, damaged, unsafe, or do not fit the config.
        ConfigError: the config cannot be built, or belongs to another class.
    """
    entry = entry_of(cls)
    wanted = Options.of(options)
    precision = read_dtype(torch_dtype=torch_dtype, dtype=dtype)
    inner = _inner(subfolder)
    place = locate(source)
    if isinstance(place, str):
        from russet.checkpoints.hub import download

        place = download.fetch_component(place, entry, wanted, inner)
    place = place / inner
    if not place.is_dir():
        raise MissingFile(f"there is no folder {place}")
    if not (place / entry.config_file).is_file() and (place / folder.INDEX).is_file():
        raise MissingFile(f"{place} is a whole pipeline; pass subfolder= to say which part of it is the {cls.__name__}")
    weights = PendingWeights.read(cls, entry, place, wanted)
    if weights.files is not None:
        check_variant({"": weights.files}, wanted.variant, place)
    made: T = weights.make(precision_of(precision, ""))
    return made


def check_overrides(overrides: Mapping[str, Any], parts: Collection[str]) -> None:
    """Raises UnsupportedArgument for a name that is neither a component of any pipeline nor one of ``parts``."""
    known = sorted({*parts, *COMPONENTS})
    if unknown := sorted(set(overrides) - set(known)):
        raise UnsupportedArgument(
            f"{', '.join(unknown)}: no such argument or component; components are {', '.join(known)}"
        )


def _inner(subfolder: str | None) -> str:
    """A subfolder, checked to be one: "" for the folder itself."""
    if subfolder is None:
        return ""
    if not isinstance(subfolder, str):
        raise ArgumentTypeError(f"subfolder must be a text, not {type(subfolder).__name__}")
    path = PurePosixPath(subfolder)
    if path.is_absolute() or ".." in path.parts or "\\" in subfolder or "\0" in subfolder:
        raise UnsafeFile(f"subfolder {subfolder!r} leads out of the checkpoint")
    return "" if str(path) == "." else str(path)


__all__ = ["Loaded", "Options", "component", "pipeline", "read_dtype"]
