"""Stable Diffusion XL: image to image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Generator, Tensor

from russet import validation
from russet.families.sdxl import Prompts
from russet.generate.spec import CallbackSpec, GuidanceSpec, NoiseSpec, SamplingSpec, Spec
from russet.generate.starts import ImageStart
from russet.pipelines.generation import tuple_on_request
from russet.pipelines.output import StableDiffusionXLPipelineOutput
from russet.pipelines.stable_diffusion_xl import ELSEWHERE, StableDiffusionXLBase


class StableDiffusionXLImg2ImgPipeline(StableDiffusionXLBase):
    """Image to image with Stable Diffusion XL and its refiner (arXiv:2307.01952, section 2.5).

    Args:
        vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler, force_zeros_for_empty_prompt: as for
            ``StableDiffusionXLPipeline``.
    """

    @tuple_on_request
    def __call__(
        self,
        /,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        image: Any = None,
        strength: float = 0.3,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        *,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        **others: Any,
    ) -> StableDiffusionXLPipelineOutput:
        """Makes pictures from pictures. Every argument is checked before any work begins.

        Args:
            prompt: what the pictures show; a list makes one picture each.
            image: what to start from: Pillow images of any mode, arrays [H, W, 3] or [B, H, W, 3] or tensors [3, H, W]
                or [B, 3, H, W] in 0..1, or lists of them; one for all prompts, or one for each. Sides are cut down to
                multiples of 8 by resizing. A tensor [B, 4, h, w] is the latents of pictures.
            strength: 0..1, how much of the picture changes: that part of the steps is made, int(steps · strength).
            num_inference_steps: steps of the whole schedule.
            timesteps, sigmas: the caller's own, descending, instead of ``num_inference_steps``.
            guidance_scale, negative_prompt, num_images_per_prompt, eta: as for ``StableDiffusionXLPipeline``.
            generator: draws the sample of the VAE's latents first, and then the noise, as in Diffusers.
            prompt_2, negative_prompt_2, prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds,
            negative_pooled_prompt_embeds, original_size, target_size, crops_coords_top_left, output_type, return_dict,
            guidance_rescale, guidance_interval, clip_skip, callback_on_step_end, callback_on_step_end_tensor_inputs,
            seed: as for ``StableDiffusionXLPipeline``.
            negative_original_size, negative_target_size, negative_crops_coords_top_left: the same for the negative
                prompt; a size left out is that of the prompt.
            aesthetic_score, negative_aesthetic_score: of the refiner, which takes them in place of the target sizes.

        Raises:
            InputError: an argument is wrong, or Russet lacks it.
            DoesNotFit: the pictures need more memory than the device has.
        """
        others |= {"denoising_start": denoising_start, "denoising_end": denoising_end, "latents": latents}
        validation.refuse_unknown(
            others, {**ELSEWHERE, "latents": "give them as image"}, "StableDiffusionXLImg2ImgPipeline()"
        )
        spec = Spec(
            prompts=Prompts(
                prompt=prompt,
                prompt_2=prompt_2,
                negative_prompt=negative_prompt,
                negative_prompt_2=negative_prompt_2,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
                original_size=original_size,
                crops_coords_top_left=crops_coords_top_left,
                target_size=target_size,
                negative_original_size=negative_original_size,
                negative_crops_coords_top_left=negative_crops_coords_top_left,
                negative_target_size=negative_target_size,
                aesthetic_score=aesthetic_score,
                negative_aesthetic_score=negative_aesthetic_score,
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
