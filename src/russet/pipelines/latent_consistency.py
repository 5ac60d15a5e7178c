"""Latent consistency models (arXiv:2310.04378): Stable Diffusion distilled to a few steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Generator, Tensor

from russet import validation
from russet.families.sd import Prompts
from russet.generate.spec import CallbackSpec, GuidanceSpec, NoiseSpec, SamplingSpec, Spec
from russet.generate.starts import NoiseStart
from russet.pipelines import stable_diffusion
from russet.pipelines.generation import tuple_on_request
from russet.pipelines.output import StableDiffusionPipelineOutput

ELSEWHERE = {
    **stable_diffusion.ELSEWHERE,
    "original_inference_steps": "make the scheduler anew: "
    "pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=…)",
    "negative_prompt": "the UNet takes guidance_scale as an input, and is called once a step, with the prompt",
}


class LatentConsistencyModelPipeline(stable_diffusion.StableDiffusionBase):
    """Text to image in 1 to 8 steps, with a UNet that was distilled to take the guidance scale as an input."""

    @tuple_on_request
    def __call__(
        self,
        /,
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
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        **others: Any,
    ) -> StableDiffusionPipelineOutput:
        """Makes pictures; the arguments mean what those of ``StableDiffusionPipeline`` do.

        Raises:
            InputError: an argument is wrong, or means nothing to these models.
            DoesNotFit: the pictures need more memory than the device has.
        """
        others["original_inference_steps"] = original_inference_steps
        validation.refuse_unknown(others, ELSEWHERE, "LatentConsistencyModelPipeline()")
        spec = Spec(
            prompts=Prompts(prompt=prompt, prompt_embeds=prompt_embeds, clip_skip=clip_skip),
            start=NoiseStart(given=latents),
            height=height,
            width=width,
            images_per_prompt=num_images_per_prompt,
            sampling=SamplingSpec(steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas, eta=eta),
            guidance=GuidanceSpec(scale=guidance_scale, interval=guidance_interval),
            noise=NoiseSpec(seed=seed, generator=generator),
            output_type=output_type,
            callback=CallbackSpec(function=callback_on_step_end, tensors=callback_on_step_end_tensor_inputs),
        )
        return self.generate(spec)
