"""Stable Diffusion on Apple silicon, and on CUDA and the CPU with the same code.

    from russet import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("mini").to("cpu")
    pipe("a photo of an astronaut riding a horse on mars", seed=42).images[0].save("astronaut.png")

The public names, those in ``HOMES``, are imported when first used: ``import russet`` takes no time and no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from russet.errors import RussetError as RussetError
    from russet.image_processor import CLIPImageProcessor as CLIPImageProcessor
    from russet.models.clip_text import CLIPTextModel as CLIPTextModel
    from russet.models.clip_text import CLIPTextModelWithProjection as CLIPTextModelWithProjection
    from russet.models.clip_vision import CLIPVisionModelWithProjection as CLIPVisionModelWithProjection
    from russet.models.safety_checker import StableDiffusionSafetyChecker as StableDiffusionSafetyChecker
    from russet.models.unet import UNet2DConditionModel as UNet2DConditionModel
    from russet.models.vae import AutoencoderKL as AutoencoderKL
    from russet.pipelines.base import DiffusionPipeline as DiffusionPipeline
    from russet.pipelines.output import StableDiffusionPipelineOutput as StableDiffusionPipelineOutput
    from russet.pipelines.stable_diffusion import StableDiffusionPipeline as StableDiffusionPipeline
    from russet.schedulers.named import DDIMScheduler as DDIMScheduler
    from russet.schedulers.named import DPMSolverMultistepScheduler as DPMSolverMultistepScheduler
    from russet.schedulers.named import EulerAncestralDiscreteScheduler as EulerAncestralDiscreteScheduler
    from russet.schedulers.named import EulerDiscreteScheduler as EulerDiscreteScheduler
    from russet.schedulers.named import PNDMScheduler as PNDMScheduler
    from russet.tokenizer import CLIPTokenizer as CLIPTokenizer

__version__ = "0.1.0"

HOMES = {
    "AutoencoderKL": "russet.models.vae",
    "CLIPImageProcessor": "russet.image_processor",
    "CLIPTextModel": "russet.models.clip_text",
    "CLIPTextModelWithProjection": "russet.models.clip_text",
    "CLIPTokenizer": "russet.tokenizer",
    "CLIPVisionModelWithProjection": "russet.models.clip_vision",
    "DDIMScheduler": "russet.schedulers.named",
    "DPMSolverMultistepScheduler": "russet.schedulers.named",
    "DiffusionPipeline": "russet.pipelines.base",
    "EulerAncestralDiscreteScheduler": "russet.schedulers.named",
    "EulerDiscreteScheduler": "russet.schedulers.named",
    "PNDMScheduler": "russet.schedulers.named",
    "RussetError": "russet.errors",
    "StableDiffusionPipeline": "russet.pipelines.stable_diffusion",
    "StableDiffusionPipelineOutput": "russet.pipelines.output",
    "StableDiffusionSafetyChecker": "russet.models.safety_checker",
    "UNet2DConditionModel": "russet.models.unet",
}
"""Public name → the module that defines it."""

__all__ = [*HOMES]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'russet' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
