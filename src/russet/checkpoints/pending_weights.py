"""One component, read in two steps: everything that can fail early, then the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from russet.checkpoints import folder, load_state_dict
from russet.checkpoints.classes import Entry
from russet.checkpoints.formats.tensor_source import Source
from russet.checkpoints.layouts import old_configs, old_keys
from russet.checkpoints.options import Options
from russet.checkpoints.weight_names import Choice
from russet.errors import ConfigError
from russet.file_io import read_json

EXTRA_TENSORS = 2000  # that a model may have beyond those in its file, so that the error can list what is missing


@dataclasses.dataclass(frozen=True)
class PendingWeights:
    """A component whose weights are not read yet: the component itself, and what a model is to be filled with."""

    component: Any
    where: str
    choice: Choice | None = None
    sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(
        cls,
        target: type[Any],
        entry: Entry,
        place: Path,
        options: Options,
        *,
        repair: bool = False,
        dtype: torch.dtype | None = None,
    ) -> PendingWeights:
        """Makes a component out of its folder; of a model's weights the headers only.

        Args:
            target: the class to make; ``entry`` is that of its family.
            place: the component's folder.
            repair: whether known faults of old configs are put right.
            dtype: that a model says it has until its weights are read.

        Raises:
            ConfigError: the config cannot be built, or is that of another class.
            CheckpointError: files are missing, damaged or unsafe, or do not fit the config.
        """
        if entry.kind in ("tokenizer", "processor"):
            return cls(target.from_files(place), str(place))
        where = str(place / entry.config_file)
        data = read_json(place / entry.config_file)
        if entry.kind == "model":
            folder.check_class(entry, data, where)
        config = target.config_class.from_dict(data, where)
        if repair:
            config = old_configs.repaired(config, where)
        if entry.kind == "scheduler":
            return cls(target(config), str(place))
        choice = folder.find_weights(place, entry, options.variant, options.use_safetensors)
        weights = folder.open_component(place, choice)
        try:
            model = load_state_dict.build(target, config, limit=len(weights.tensors) + EXTRA_TENSORS, dtype=dtype)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        sources = old_keys.renewed(weights.tensors, wanted)
        load_state_dict.check(model, sources, weights.where)
        return cls(model, str(place), choice, sources)

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
        """The component, complete: a model in ``dtype`` on ``device``."""
        if self.sources:
            load_state_dict.fill(self.component, self.sources, self.where, dtype=dtype, device=device)
        return self.component

    def for_reloading(self) -> PendingWeights:
        """The same without the component, which whoever keeps this for later would keep alive."""
        return dataclasses.replace(self, component=None)

    def refill(
        self, network: nn.Module, *, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> None:
        """Reads the weights again into a network that has lost them."""
        load_state_dict.fill(network, self.sources, self.where, dtype=dtype, device=device, memory_format=memory_format)
