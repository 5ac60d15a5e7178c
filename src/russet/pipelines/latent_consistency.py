"""Latent consistency models (arXiv:2310.04378): Stable Diffusion distilled to draw in a few steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Generator, Tensor

from russet import validation
from russet.pipelines.output import StableDiffusionPipelineOutput
from russet.pipelines.stable_diffusion import StableDiffusionPipeline

ELSEWHERE = {
    "original_inference_steps": "make the scheduler anew: "
    "pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=…)",
    "negative_prompt": "the UNet is told guidance_scale and asked once, with the prompt",
}


class LatentConsistencyModelPipeline(StableDiffusionPipeline):
    """Text to image in 1 to 8 steps, with a UNet that was distilled to be told the guidance scale."""

    def __call__(  # type: ignore[override]  # the order of the arguments is Diffusers'
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        original_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 8.5,
        num_images_per_prompt: int = 1,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        *,
        output_type: str = "pil",
        return_dict: bool = True,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        **others: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Draws pictures: ``StableDiffusionPipeline``'s call, with the steps and the scale of these models.

        Raises:
            InputError: an argument is wrong, or means nothing to these models.
            DoesNotFit: the pictures need more memory than the device has.
        """
        asked = {"original_inference_steps": original_inference_steps}
        asked |= {name: others.pop(name) for name in ELSEWHERE if name in others}
        validation.refuse_unknown(asked, ELSEWHERE, "LatentConsistencyModelPipeline()")
        return super().__call__(
            prompt,
            height,
            width,
            num_inference_steps,
            timesteps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            output_type=output_type,
            return_dict=return_dict,
            clip_skip=clip_skip,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            seed=seed,
            **others,
        )
