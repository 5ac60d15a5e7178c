"""Which configs a single file is loaded with: the caller's, or the bundled ones of what the file was recognised as."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from russet.checkpoints import configs, prediction
from russet.checkpoints.configs import Recipe
from russet.checkpoints.files import Weights
from russet.checkpoints.kinds import Kind
from russet.checkpoints.locate import locate
from russet.checkpoints.options import Options
from russet.checkpoints.prediction import Prediction
from russet.errors import ArgumentTypeError, CheckpointError, InputError

log = logging.getLogger(__name__)

TURBO_FILES = re.compile(r"sd_?(xl_?)?turbo")  # how Stability AI names its files


@dataclasses.dataclass(frozen=True)
class Request:
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


def choose_recipe(
    kind: Kind,
    weights: Weights,
    path: Path,
    request: Request,
    overrides: Mapping[str, Any],
    options: Options,
) -> Recipe:
    """The configs for a file of ``kind``.

    Raises:
        InputError: the request has a wrong value.
        CheckpointError: there are no bundled configs for this kind, or those asked for cannot be read.
        ConfigError: the caller's configs cannot be used.
    """
    asked = request.prediction_type
    scheduler = overrides.get("scheduler")
    if asked is None and scheduler is not None:
        asked = getattr(scheduler, "config", {}).get("prediction_type")
    told = prediction.decide(
        kind,
        asked=asked,
        sidecar=sidecar(path, request),
        names=weights.tensors,
        metadata=weights.metadata,
        stem=path.stem,
    )
    if request.config is not None and not isinstance(request.config, Mapping):
        recipe = named_recipe(request.config, options)
        return adapted(recipe, told) if request.prediction_type else recipe
    name = model_name(kind, told, weights.metadata, path.stem)
    given = checked_configs(request.config or {})
    if name not in configs.models():
        raise CheckpointError(f"{path} is a {kind}, of which Russet cannot make pictures")
    recipe = configs.bundled(name)
    for component, config in given.items():
        recipe = recipe.replaced(component, config)
    if "scheduler" in given and not request.prediction_type:
        return recipe
    if told.meaning is None:
        log.warning(
            "%s: %s whether this Stable Diffusion 2 model predicts noise or velocity; taking v_prediction, as the "
            "768-pixel models have it. If pictures come out as noise, load it with prediction_type='epsilon'; "
            "prediction_type='v_prediction' confirms and ends this warning",
            path,
            told.why,
        )
    return adapted(recipe, told)


def model_name(kind: Kind, told: Prediction, metadata: Mapping[str, str], stem: str) -> str:
    """The name of the bundled model that a file is like."""
    turbo = TURBO_FILES.match(stem.lower()) or "turbo" in metadata.get("modelspec.architecture", "")
    if kind.family == "sd2" and not kind.task:
        return "sd-turbo" if turbo else "sd2-base" if told.meaning == "epsilon" else "sd2-v"
    if kind.family == "sdxl" and not kind.task and turbo:
        return "sdxl-turbo"
    return "-".join(word for word in (kind.family, kind.task) if word)


def adapted(recipe: Recipe, told: Prediction) -> Recipe:
    """The recipe with a scheduler for what the model predicts and for the noise that it was trained with."""
    scheduler = recipe.parts.get("scheduler") or {}
    changes: dict[str, Any] = {}
    if told.meaning and scheduler.get("prediction_type", "epsilon") != told.meaning:
        changes["prediction_type"] = told.meaning
    if told.zero_snr:  # sampling must begin at the last timestep then (Lin et al. 2023, arXiv:2305.08891)
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
        from russet.checkpoints import hub

        place = hub.fetch_configs(place, options)
    return configs.from_folder(place)


def checked_configs(given: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any] | None]:
    """A caller's dict of configs, its keys and values of the right kind."""
    for name, value in given.items():
        if name not in configs.COMPONENTS:
            raise InputError(f"config has {name!r}; it may have {', '.join(configs.COMPONENTS)}")
        if value is not None and not isinstance(value, Mapping):
            raise ArgumentTypeError(f"config[{name!r}] must be a dict of a component's config, not {value!r}")
    return given


def sidecar(path: Path, request: Request) -> Mapping[str, Any] | None:
    """The YAML config that the caller gives, else one that lies beside the file under its name."""
    if (given := request.original_config) is not None:
        if not isinstance(given, (str, os.PathLike)):
            raise ArgumentTypeError(f"original_config must be the path of a YAML file, not {given!r}")
        if "://" in os.fspath(given):
            raise InputError(f"original_config must be a file on this machine, not {given!r}; download it first")
        return prediction.read_sidecar(Path(given).expanduser())
    beside = (path.with_suffix(suffix) for suffix in (".yaml", ".yml"))
    return next((prediction.read_sidecar(file) for file in beside if file.is_file()), None)
