"""Stable Diffusion 1.x and 2.x: image to image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Generator, Tensor

from russet import validation
from russet.families.sd import Prompts
from russet.generate.spec import CallbackSpec, GuidanceSpec, NoiseSpec, SamplingSpec, Spec
from russet.generate.starts import ImageStart
from russet.pipelines.generation import tuple_on_request
from russet.pipelines.output import StableDiffusionPipelineOutput
from russet.pipelines.stable_diffusion import ELSEWHERE, StableDiffusionBase


class StableDiffusionImg2ImgPipeline(StableDiffusionBase):
    """Image to image with Stable Diffusion 1.x and 2.x (arXiv:2108.01073): noise is added, and taken away by a prompt.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor: as for
            ``StableDiffusionPipeline``.
    """

    @tuple_on_request
    def __call__(
        self,
        /,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator | Sequence[Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        *,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        **others: Any,
    ) -> StableDiffusionPipelineOutput:
        """Makes pictures from pictures. Every argument is checked before any work begins.

        Args:
            prompt: what the pictures show; a list makes one picture each.
            image: what to start from: Pillow images of any mode, arrays [H, W, 3] or [B, H, W, 3] or tensors [3, H, W]
                or [B, 3, H, W] in 0..1, or lists of them; one for all prompts, or one for each. Sides are cut down to
                multiples of 8 by resizing. A tensor [B, 4, h, w] is the latents of pictures.
            strength: 0..1, how much of the picture changes: that part of the steps is made, int(steps · strength).
            num_inference_steps: steps of the whole schedule.
            timesteps, sigmas: the caller's own, descending, instead of ``num_inference_steps``.
            guidance_scale, negative_prompt, num_images_per_prompt, eta: as for ``StableDiffusionPipeline``.
            generator: draws the sample of the VAE's latents first, and then the noise, as in Diffusers.
            prompt_embeds, negative_prompt_embeds, output_type, return_dict, guidance_rescale, guidance_interval,
            clip_skip, callback_on_step_end, callback_on_step_end_tensor_inputs, seed: as for
                ``StableDiffusionPipeline``.

        Raises:
            InputError: an argument is wrong, or Russet lacks it.
            DoesNotFit: the pictures need more memory than the device has.
        """
        validation.refuse_unknown(others, ELSEWHERE, "StableDiffusionImg2ImgPipeline()")
        spec = Spec(
            prompts=Prompts(
                prompt=prompt,
                negative_prompt=negative_prompt,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                clip_skip=clip_skip,
            ),
            start=ImageStart(image=image, strength=strength),
            images_per_prompt=num_images_per_prompt,
            sampling=SamplingSpec(steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas, eta=eta),
            guidance=GuidanceSpec(scale=guidance_scale, rescale=guidance_rescale, interval=guidance_interval),
            noise=NoiseSpec(seed=seed, generator=generator),
            output_type=output_type,
            callback=CallbackSpec(function=callback_on_step_end, tensors=callback_on_step_end_tensor_inputs),
        )
        return self.generate(spec)
