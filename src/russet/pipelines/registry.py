"""The one table from a checkpoint's pipeline name to the pipeline."""

from __future__ import annotations

from russet.errors import ConfigError
from russet.pipelines.base import DiffusionPipeline
from russet.pipelines.latent_consistency import LatentConsistencyModelPipeline
from russet.pipelines.stable_diffusion import StableDiffusionPipeline
from russet.pipelines.stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from russet.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from russet.pipelines.stable_diffusion_xl_img2img import StableDiffusionXLImg2ImgPipeline

PIPELINES: dict[str, type[DiffusionPipeline]] = {
    "LatentConsistencyModelPipeline": LatentConsistencyModelPipeline,
    "StableDiffusionImg2ImgPipeline": StableDiffusionImg2ImgPipeline,
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLImg2ImgPipeline": StableDiffusionXLImg2ImgPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}


def pipeline_class(name: str) -> type[DiffusionPipeline]:
    """The pipeline that a ``model_index.json`` names.

    Raises:
        ConfigError: Russet has no such pipeline.
    """
    if name not in PIPELINES:
        raise ConfigError(
            f"model_index.json asks for a {name}, which Russet does not have; it has {', '.join(PIPELINES)}. "
            "Load it as one of those by calling from_pretrained on that class"
        )
    return PIPELINES[name]
