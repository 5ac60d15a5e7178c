"""Which configs a single file is loaded with: the caller's, or the bundled ones of what the file was recognised as."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from russet.checkpoints import configs
from russet.checkpoints.arguments import Options, locate
from russet.checkpoints.configs import Recipe
from russet.checkpoints.formats.weight_files import Weights, open_weights
from russet.checkpoints.layouts.detection import FileKind, recognise
from russet.checkpoints.single_file.prediction import Prediction, decide_prediction, read_sidecar
from russet.errors import ArgumentTypeError, CheckpointError, InputError

TURBO_FILES = re.compile(r"sd_?(xl_?)?turbo")  # how Stability AI names its files


@dataclasses.dataclass(frozen=True)
class SingleFileRequest:
    """How a caller wants a single file understood, beyond where it is.

    Args:
        config: the model's configs, where the bundled ones are not right: the name of another bundled model ("sd2-v"),
            "mini", a folder in Diffusers form, a Hub id, or a dict from component to config.
        original_config: a YAML config of LDM or SGM, taken instead of the one beside the file.
        prediction_type: "epsilon" or "v_prediction", where the file does not say.
        extract_ema: take the averaged UNet, where the file has both.

    Raises:
        ArgumentTypeError: a value of a wrong type.
    """

    config: str | os.PathLike[str] | Mapping[str, Any] | None = None
    original_config: str | os.PathLike[str] | None = None
    prediction_type: str | None = None
    extract_ema: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.extract_ema, bool):
            raise ArgumentTypeError(f"extract_ema must be True or False, not {self.extract_ema!r}")
        if not isinstance(self.prediction_type, (str, type(None))):
            raise ArgumentTypeError(f"prediction_type must be a text, not {self.prediction_type!r}")


@dataclasses.dataclass(frozen=True)
class SingleFile:
    """A weight file whose header has been read, and what it was recognised as."""

    path: Path
    weights: Weights
    kind: FileKind

    @classmethod
    def at(cls, path: Path) -> SingleFile:
        """Opens a file; raises as ``open_weights`` does."""
        weights = open_weights(path)
        return cls(path, weights, recognise(weights.shapes))

    def prediction(self, request: SingleFileRequest, scheduler: Any = None) -> Prediction:
        """What the model predicts, as far as the caller, its scheduler, the file and a YAML file beside it say.

        Raises:
            InputError: the request has a wrong value.
            CheckpointError: the YAML file cannot be read.
        """
        requested = request.prediction_type
        if requested is None and scheduler is not None:
            requested = getattr(scheduler, "config", {}).get("prediction_type")
        return decide_prediction(
            self.kind,
            requested=requested,
            sidecar=sidecar(self.path, request),
            names=self.weights.tensors,
            metadata=self.weights.metadata,
            stem=self.path.stem,
        )

    def model(self, prediction: Prediction) -> str:
        """The name of the bundled model that the file is like; there may be none of that name."""
        architecture = self.weights.metadata.get("modelspec.architecture", "")
        turbo = TURBO_FILES.match(self.path.stem.lower()) or "turbo" in architecture
        family, task = self.kind.family, self.kind.task
        if family == "sd2" and not task:
            return "sd-turbo" if turbo else "sd2-base" if prediction.meaning == "epsilon" else "sd2-v"
        if family == "sdxl" and not task and turbo:
            return "sdxl-turbo"
        return "-".join(word for word in (family, task) if word)


def choose_recipe(file: SingleFile, prediction: Prediction, request: SingleFileRequest, options: Options) -> Recipe:
    """The configs for a file: the caller's where there are such, else the bundled ones of what it is and predicts.

    Raises:
        InputError: the request has a wrong value.
        CheckpointError: there are no bundled configs for this kind, or those asked for cannot be read.
        ConfigError: the caller's configs cannot be used.
    """
    if request.config is not None and not isinstance(request.config, Mapping):
        recipe = named_recipe(request.config, options)
        return adapted(recipe, prediction) if request.prediction_type else recipe
    given = checked_configs(request.config or {})
    if (name := file.model(prediction)) not in configs.models():
        raise CheckpointError(f"{file.path} is a {file.kind}, of which Russet cannot make pictures")
    recipe = configs.bundled(name)
    for component, config in given.items():
        recipe = recipe.replaced(component, config)
    return recipe if "scheduler" in given and not request.prediction_type else adapted(recipe, prediction)


def needs_probe(prediction: Prediction, request: SingleFileRequest) -> bool:
    """Whether only the UNet itself can show what a model predicts."""
    config = request.config
    return prediction.meaning is None and (
        config is None or (isinstance(config, Mapping) and "scheduler" not in config)
    )


def adapted(recipe: Recipe, prediction: Prediction) -> Recipe:
    """The recipe with a scheduler for what the model predicts and for the noise that it was trained with."""
    scheduler = recipe.parts.get("scheduler") or {}
    changes: dict[str, Any] = {}
    if prediction.meaning and scheduler.get("prediction_type", "epsilon") != prediction.meaning:
        changes["prediction_type"] = prediction.meaning
    if prediction.zero_snr:  # sampling must begin at the last timestep then (Lin et al. 2023, arXiv:2305.08891)
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if scheduler.get("_class_name") == "PNDMScheduler":  # which would divide by the zero
            changes["_class_name"] = "DDIMScheduler"
    return recipe.changed("scheduler", **changes) if changes else recipe


def named_recipe(config: str | os.PathLike[str], options: Options) -> Recipe:
    """Configs by the name of a bundled model, or from wherever a pipeline's folder is."""
    if isinstance(config, str) and config in configs.models():
        return configs.bundled(config)
    place = locate(config)
    if isinstance(place, str):
        from russet.checkpoints.hub import download

        place = download.fetch_configs(place, options)
    return configs.from_folder(place)


def checked_configs(given: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any] | None]:
    """A caller's dict of configs, its keys and values of the right kind."""
    for name, value in given.items():
        if name not in configs.COMPONENTS:
            raise InputError(f"config has {name!r}; it may have {', '.join(configs.COMPONENTS)}")
        if value is not None and not isinstance(value, Mapping):
            raise ArgumentTypeError(f"config[{name!r}] must be a dict of a component's config, not {value!r}")
    return given


def sidecar(path: Path, request: SingleFileRequest) -> Mapping[str, Any] | None:
    """The YAML config that the caller gives, else one that lies beside the file under its name."""
    if (given := request.original_config) is not None:
        if not isinstance(given, (str, os.PathLike)):
            raise ArgumentTypeError(f"original_config must be the path of a YAML file, not {given!r}")
        if "://" in os.fspath(given):
            raise InputError(f"original_config must be a file on this machine, not {given!r}; download it first")
        return read_sidecar(Path(given).expanduser())
    beside = (path.with_suffix(suffix) for suffix in (".yaml", ".yml"))
    return next((read_sidecar(file) for file in beside if file.is_file()), None)
