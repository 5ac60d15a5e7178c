"""A checkpoint folder in Diffusers form: its model_index.json, and the classes of its components.

Class names in a checkpoint may be hostile: they are looked up in a table and never imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from russet.errors import ConfigError, MissingFile, UnsafeFile
from russet.file_io import read_json

INDEX = "model_index.json"
CONFIG_FILES = {
    "model": "config.json",
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "processor": "preprocessor_config.json",
}
_NAME = re.compile(r"\w{1,100}", re.ASCII)


# ------------------------------------------------------------------------------------------------- component classes


@dataclasses.dataclass(frozen=True)
class ClassEntry:
    """What is known about a component's class before it is imported.

    ``library`` is what model_index.json files name as its origin; it also decides the names of weight files.
    """

    name: str
    library: Literal["diffusers", "transformers", "stable_diffusion"]
    module: str
    kind: Literal["model", "scheduler", "tokenizer", "processor"]
    model_type: str = ""  # in the config of a model of transformers

    def load(self) -> type[Any]:
        """The class itself."""
        cls: type[Any] = getattr(importlib.import_module(f"russet.{self.module}"), self.name)
        return cls

    @property
    def config_file(self) -> str:
        """The name of its JSON file."""
        return CONFIG_FILES[self.kind]

    @property
    def stems(self) -> dict[str, str]:
        """Extension → how the names of its weight files begin."""
        if self.library == "diffusers":
            return {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"}
        return {"safetensors": "model", "bin": "pytorch_model"}


SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)

CLASSES: dict[str, ClassEntry] = {
    entry.name: entry
    for entry in (
        ClassEntry("UNet2DConditionModel", "diffusers", "models.unet", "model"),
        ClassEntry("AutoencoderKL", "diffusers", "models.vae", "model"),
        ClassEntry("AutoencoderTiny", "diffusers", "models.tiny_vae", "model"),
        ClassEntry("CLIPTextModel", "transformers", "models.clip_text", "model", "clip_text_model"),
        ClassEntry("CLIPTextModelWithProjection", "transformers", "models.clip_text", "model", "clip_text_model"),
        ClassEntry("CLIPVisionModelWithProjection", "transformers", "models.clip_vision", "model", "clip_vision_model"),
        ClassEntry("StableDiffusionSafetyChecker", "stable_diffusion", "models.safety_checker", "model", "clip"),
        ClassEntry("CLIPTokenizer", "transformers", "text.tokenizer", "tokenizer"),
        ClassEntry("CLIPImageProcessor", "transformers", "images.clip_processor", "processor"),
        *(ClassEntry(name, "diffusers", "schedulers.named", "scheduler") for name in SCHEDULERS),
    )
}

# Other names that checkpoints have for the same classes.
ALIASES = {
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "CLIPImageProcessorFast": "CLIPImageProcessor",
    "CLIPImageProcessorPil": "CLIPImageProcessor",
    "CLIPTokenizerFast": "CLIPTokenizer",
}

# Components of all pipelines; an index may leave out those that it does without.
COMPONENTS = (
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "unet",
    "scheduler",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
)


def find_class(name: str, where: str) -> ClassEntry:
    """The entry of a class name; ConfigError if Russet has no such class, with ``where`` it was named."""
    entry = CLASSES.get(ALIASES.get(name, name))
    if entry is None:
        known = ", ".join(sorted(CLASSES))
        raise ConfigError(f"{where} asks for the class {name[:100]!r}, which Russet does not have; it has {known}")
    return entry


def entry_of(cls: type[Any]) -> ClassEntry:
    """The entry of one of Russet's classes, or of a subclass of one; ConfigError if it is neither."""
    for base in cls.__mro__:
        if base.__module__.startswith("russet.") and base.__name__ in CLASSES:
            return CLASSES[base.__name__]
    raise ConfigError(f"{cls.__name__} is not a component that Russet can load or save")


def check_class(entry: ClassEntry, config: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError where a model's config names another class than the one that was asked for."""
    names = config.get("_class_name") if entry.library == "diffusers" else config.get("architectures")
    given = names if isinstance(names, list) else [names]
    known = {name for name in given if isinstance(name, str) and name in CLASSES}
    if known and entry.name not in known:
        raise ConfigError(f"{where} is the config of a {', '.join(sorted(known))}, not of a {entry.name}")


# ------------------------------------------------------------------------------------------------- model_index.json


@dataclasses.dataclass(frozen=True)
class PipelineIndex:
    """A model_index.json: the pipeline's class, and for each component the name of its class or None."""

    class_name: str
    parts: Mapping[str, str | None]
    raw: Mapping[str, Any]
    where: str

    def entries(self, skipped: Collection[str]) -> dict[str, ClassEntry]:
        """The components to be loaded, with their classes; ``skipped`` are provided by the caller."""
        wanted = {part: name for part, name in self.parts.items() if name is not None and part not in skipped}
        return {part: find_class(name, f"{self.where}, {part}") for part, name in wanted.items()}


def read_index(folder: Path) -> PipelineIndex:
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


def parse_index(raw: Mapping[str, Any], where: str) -> PipelineIndex:
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
    return PipelineIndex(class_name, parts, raw, where)


def _instead(folder: Path) -> str:
    """What a folder without model_index.json seems to be."""
    names = {path.name for path in folder.iterdir()}
    if names & {"config.json", "scheduler_config.json"}:
        return ": it is a single component; load it with the from_pretrained of its class"
    if singles := sorted(name for name in names if name.endswith((".safetensors", ".ckpt"))):
        return f"; load a single file such as {singles[0]} with from_single_file"
    if parts := sorted(path.name for path in folder.iterdir() if (path / INDEX).is_file()):
        return f"; the folder {parts[0]} in it has one"
    return ": it is not a pipeline in Diffusers form"
