"""The one table from a class name in a checkpoint's JSON to the class of ours.

Names in a checkpoint are a stranger's text, so they are looked up here and never imported.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, Literal

from russet.errors import ConfigError

Kind = Literal["model", "scheduler", "tokenizer", "processor"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """What there is to know about a class before it is imported.

    ``library`` is what model_index.json files name as its origin; it also decides the names of weight files.
    """

    name: str
    library: Literal["diffusers", "transformers", "stable_diffusion"]
    module: str
    kind: Kind
    model_type: str = ""  # in the config of a model of transformers

    def load(self) -> type[Any]:
        """The class itself."""
        cls: type[Any] = getattr(importlib.import_module(f"russet.{self.module}"), self.name)
        return cls

    @property
    def config_file(self) -> str:
        """The name of its JSON file."""
        files = {
            "model": "config.json",
            "scheduler": "scheduler_config.json",
            "tokenizer": "tokenizer_config.json",
            "processor": "preprocessor_config.json",
        }
        return files[self.kind]

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

TABLE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("UNet2DConditionModel", "diffusers", "models.unet", "model"),
        Entry("AutoencoderKL", "diffusers", "models.vae", "model"),
        Entry("AutoencoderTiny", "diffusers", "models.tiny_vae", "model"),
        Entry("CLIPTextModel", "transformers", "models.clip_text", "model", "clip_text_model"),
        Entry("CLIPTextModelWithProjection", "transformers", "models.clip_text", "model", "clip_text_model"),
        Entry("CLIPVisionModelWithProjection", "transformers", "models.clip_vision", "model", "clip_vision_model"),
        Entry("StableDiffusionSafetyChecker", "stable_diffusion", "models.safety_checker", "model", "clip"),
        Entry("CLIPTokenizer", "transformers", "text.tokenizer", "tokenizer"),
        Entry("CLIPImageProcessor", "transformers", "images.clip_processor", "processor"),
        *(Entry(name, "diffusers", "schedulers.named", "scheduler") for name in SCHEDULERS),
    )
}

# Components of the pipelines that there are; an index may leave out those that it does without.
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

# Other names that checkpoints have for the same things.
ALIASES = {
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "CLIPImageProcessorFast": "CLIPImageProcessor",
    "CLIPImageProcessorPil": "CLIPImageProcessor",
    "CLIPTokenizerFast": "CLIPTokenizer",
}


def find(name: str, where: str) -> Entry:
    """The entry of a class name; ``where`` says in errors who asks for it.

    Raises:
        ConfigError: Russet has no such class.
    """
    entry = TABLE.get(ALIASES.get(name, name))
    if entry is None:
        raise ConfigError(
            f"{where} asks for the class {name[:100]!r}, which Russet does not have; it has {', '.join(sorted(TABLE))}"
        )
    return entry


def entry_of(cls: type[Any]) -> Entry:
    """The entry of a class of ours, or of a class made from one.

    Raises:
        ConfigError: it is none of ours.
    """
    for base in cls.__mro__:
        if base.__module__.startswith("russet.") and base.__name__ in TABLE:
            return TABLE[base.__name__]
    raise ConfigError(f"{cls.__name__} is not a component that Russet can load or save")
