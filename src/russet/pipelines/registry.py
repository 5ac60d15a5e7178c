"""The one table from a checkpoint's pipeline name to the pipeline."""

from __future__ import annotations

import importlib
from typing import Any

from russet.errors import ConfigError

PIPELINES = {
    "LatentConsistencyModelPipeline": "russet.pipelines.latent_consistency",
    "StableDiffusionImg2ImgPipeline": "russet.pipelines.stable_diffusion_img2img",
    "StableDiffusionPipeline": "russet.pipelines.stable_diffusion",
    "StableDiffusionXLImg2ImgPipeline": "russet.pipelines.stable_diffusion_xl_img2img",
    "StableDiffusionXLPipeline": "russet.pipelines.stable_diffusion_xl",
}
"""Class name → its module, which is imported when a checkpoint asks for it: the classes build on what reads this."""


def pipeline_class(name: str) -> Any:
    """The class of the pipeline that a ``model_index.json`` names.

    Raises:
        ConfigError: Russet has no such pipeline.
    """
    if name not in PIPELINES:
        raise ConfigError(
            f"model_index.json asks for a {name}, which Russet does not have; it has {', '.join(PIPELINES)}. "
            "Load it as one of those by calling from_pretrained on that class"
        )
    return getattr(importlib.import_module(PIPELINES[name]), name)
