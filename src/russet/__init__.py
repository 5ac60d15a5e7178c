"""Stable Diffusion on Apple silicon, and on CUDA and the CPU with the same code.

    from russet import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("mini").to("cpu")
    pipe("a photo of an astronaut riding a horse on mars", seed=42).images[0].save("astronaut.png")

The public names, those in ``HOMES``, are imported when first used: ``import russet`` takes no time and no torch.
"""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from russet.errors import RussetError as RussetError
    from russet.images.clip_processor import CLIPImageProcessor as CLIPImageProcessor
    from russet.models.clip_text import CLIPTextModel as CLIPTextModel
    from russet.models.clip_text import CLIPTextModelWithProjection as CLIPTextModelWithProjection
    from russet.models.clip_vision import CLIPVisionModelWithProjection as CLIPVisionModelWithProjection
    from russet.models.safety_checker import StableDiffusionSafetyChecker as StableDiffusionSafetyChecker
    from russet.models.tiny_vae import AutoencoderTiny as AutoencoderTiny
    from russet.models.unet import UNet2DConditionModel as UNet2DConditionModel
    from russet.models.vae import AutoencoderKL as AutoencoderKL
    from russet.pipelines.base import DiffusionPipeline as DiffusionPipeline
    from russet.pipelines.latent_consistency import LatentConsistencyModelPipeline as LatentConsistencyModelPipeline
    from russet.pipelines.output import StableDiffusionPipelineOutput as StableDiffusionPipelineOutput
    from russet.pipelines.output import StableDiffusionXLPipelineOutput as StableDiffusionXLPipelineOutput
    from russet.pipelines.stable_diffusion import StableDiffusionPipeline as StableDiffusionPipeline
    from russet.pipelines.stable_diffusion_img2img import (
        StableDiffusionImg2ImgPipeline as StableDiffusionImg2ImgPipeline,
    )
    from russet.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline as StableDiffusionXLPipeline
    from russet.pipelines.stable_diffusion_xl_img2img import (
        StableDiffusionXLImg2ImgPipeline as StableDiffusionXLImg2ImgPipeline,
    )
    from russet.schedulers.named import DDIMCFGPPScheduler as DDIMCFGPPScheduler
    from russet.schedulers.named import DDIMScheduler as DDIMScheduler
    from russet.schedulers.named import DDPMScheduler as DDPMScheduler
    from russet.schedulers.named import DEISMultistepScheduler as DEISMultistepScheduler
    from russet.schedulers.named import DPMSolverMultistepScheduler as DPMSolverMultistepScheduler
    from russet.schedulers.named import DPMSolverSDEScheduler as DPMSolverSDEScheduler
    from russet.schedulers.named import DPMSolverSinglestepAncestralScheduler as DPMSolverSinglestepAncestralScheduler
    from russet.schedulers.named import DPMSolverSinglestepScheduler as DPMSolverSinglestepScheduler
    from russet.schedulers.named import EulerAncestralCFGPPScheduler as EulerAncestralCFGPPScheduler
    from russet.schedulers.named import EulerAncestralDiscreteScheduler as EulerAncestralDiscreteScheduler
    from russet.schedulers.named import EulerCFGPPScheduler as EulerCFGPPScheduler
    from russet.schedulers.named import EulerChurnScheduler as EulerChurnScheduler
    from russet.schedulers.named import EulerDiscreteScheduler as EulerDiscreteScheduler
    from russet.schedulers.named import HeunDiscreteScheduler as HeunDiscreteScheduler
    from russet.schedulers.named import IPNDMDiscreteScheduler as IPNDMDiscreteScheduler
    from russet.schedulers.named import IPNDMScheduler as IPNDMScheduler
    from russet.schedulers.named import KDPM2AncestralDiscreteScheduler as KDPM2AncestralDiscreteScheduler
    from russet.schedulers.named import KDPM2DiscreteScheduler as KDPM2DiscreteScheduler
    from russet.schedulers.named import LCMScheduler as LCMScheduler
    from russet.schedulers.named import LMSDiscreteScheduler as LMSDiscreteScheduler
    from russet.schedulers.named import PNDMScheduler as PNDMScheduler
    from russet.schedulers.named import RestartScheduler as RestartScheduler
    from russet.schedulers.named import TCDScheduler as TCDScheduler
    from russet.schedulers.named import UniPCMultistepScheduler as UniPCMultistepScheduler
    from russet.schedulers.names import list_samplers as list_samplers
    from russet.schedulers.names import list_schedules as list_schedules
    from russet.text.tokenizer import CLIPTokenizer as CLIPTokenizer

__version__ = "0.1.0"

HOMES = {
    "AutoencoderKL": "russet.models.vae",
    "AutoencoderTiny": "russet.models.tiny_vae",
    "CLIPImageProcessor": "russet.images.clip_processor",
    "CLIPTextModel": "russet.models.clip_text",
    "CLIPTextModelWithProjection": "russet.models.clip_text",
    "CLIPTokenizer": "russet.text.tokenizer",
    "CLIPVisionModelWithProjection": "russet.models.clip_vision",
    "DDIMCFGPPScheduler": "russet.schedulers.named",
    "DDIMScheduler": "russet.schedulers.named",
    "DDPMScheduler": "russet.schedulers.named",
    "DEISMultistepScheduler": "russet.schedulers.named",
    "DPMSolverMultistepScheduler": "russet.schedulers.named",
    "DPMSolverSDEScheduler": "russet.schedulers.named",
    "DPMSolverSinglestepAncestralScheduler": "russet.schedulers.named",
    "DPMSolverSinglestepScheduler": "russet.schedulers.named",
    "DiffusionPipeline": "russet.pipelines.base",
    "EulerAncestralCFGPPScheduler": "russet.schedulers.named",
    "EulerAncestralDiscreteScheduler": "russet.schedulers.named",
    "EulerCFGPPScheduler": "russet.schedulers.named",
    "EulerChurnScheduler": "russet.schedulers.named",
    "EulerDiscreteScheduler": "russet.schedulers.named",
    "HeunDiscreteScheduler": "russet.schedulers.named",
    "IPNDMDiscreteScheduler": "russet.schedulers.named",
    "IPNDMScheduler": "russet.schedulers.named",
    "KDPM2AncestralDiscreteScheduler": "russet.schedulers.named",
    "KDPM2DiscreteScheduler": "russet.schedulers.named",
    "LCMScheduler": "russet.schedulers.named",
    "LMSDiscreteScheduler": "russet.schedulers.named",
    "LatentConsistencyModelPipeline": "russet.pipelines.latent_consistency",
    "PNDMScheduler": "russet.schedulers.named",
    "RestartScheduler": "russet.schedulers.named",
    "RussetError": "russet.errors",
    "StableDiffusionImg2ImgPipeline": "russet.pipelines.stable_diffusion_img2img",
    "StableDiffusionPipeline": "russet.pipelines.stable_diffusion",
    "StableDiffusionPipelineOutput": "russet.pipelines.output",
    "StableDiffusionSafetyChecker": "russet.models.safety_checker",
    "StableDiffusionXLImg2ImgPipeline": "russet.pipelines.stable_diffusion_xl_img2img",
    "StableDiffusionXLPipeline": "russet.pipelines.stable_diffusion_xl",
    "StableDiffusionXLPipelineOutput": "russet.pipelines.output",
    "TCDScheduler": "russet.schedulers.named",
    "UNet2DConditionModel": "russet.models.unet",
    "UniPCMultistepScheduler": "russet.schedulers.named",
    "list_samplers": "russet.schedulers.names",
    "list_schedules": "russet.schedulers.names",
}
"""Public name → the module that defines it."""

__all__ = [*HOMES]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'russet' has no attribute {name!r}")
    collecting = gc.isenabled()
    gc.disable()  # imports leave next to no garbage, and a full collection goes through all objects of torch
    try:
        value = globals()[name] = getattr(importlib.import_module(HOMES[name]), name)
    finally:
        if collecting:
            gc.enable()
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
