"""Stable Diffusion XL: text to image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Generator, Tensor

from russet import validation
from russet.families.sdxl import Prompts, StableDiffusionXL
from russet.generate.spec import CallbackSpec, GuidanceSpec, NoiseSpec, SamplingSpec, Spec
from russet.generate.starts import NoiseStart
from russet.models.autoencoder import Autoencoder
from russet.models.clip_text import CLIPTextModel, CLIPTextModelWithProjection
from russet.models.tiny_vae import AutoencoderTiny
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL
from russet.pipelines import stable_diffusion
from russet.pipelines.base import Part
from russet.pipelines.generation import GenerationPipeline, tuple_on_request
from russet.pipelines.output import StableDiffusionXLPipelineOutput
from russet.schedulers.scheduler import Scheduler
from russet.text.tokenizer import CLIPTokenizer

ELSEWHERE = {
    **stable_diffusion.ELSEWHERE,
    "denoising_end": "a run ends with its schedule: give the caller's own sigmas",
    "denoising_start": "a run begins where strength says",
}


class StableDiffusionXLBase(GenerationPipeline[StableDiffusionXLPipelineOutput]):
    """The components of Stable Diffusion XL.

    Args:
        force_zeros_for_empty_prompt: whether the negative half is zeros where there is no negative prompt; left out, as
            the checkpoint says, or True.
    """

    parts: ClassVar = {
        "vae": Part(AutoencoderKL, (AutoencoderTiny,), optional=True),
        "text_encoder": Part(CLIPTextModel, optional=True),
        "text_encoder_2": Part(CLIPTextModelWithProjection, optional=True),
        "tokenizer": Part(CLIPTokenizer, optional=True),
        "tokenizer_2": Part(CLIPTokenizer, optional=True),
        "unet": Part(UNet2DConditionModel),
        "scheduler": Part(Scheduler),
    }
    family_class = StableDiffusionXL
    output = StableDiffusionXLPipelineOutput

    vae: Autoencoder | None
    text_encoder: CLIPTextModel | None
    text_encoder_2: CLIPTextModelWithProjection | None
    tokenizer: CLIPTokenizer | None
    tokenizer_2: CLIPTokenizer | None
    unet: UNet2DConditionModel
    scheduler: Scheduler

    def __init__(self, *, force_zeros_for_empty_prompt: bool | None = None, **components: Any) -> None:
        super().__init__(**components)
        if force_zeros_for_empty_prompt is not None:
            zeros = validation.flag("force_zeros_for_empty_prompt", force_zeros_for_empty_prompt)
            self.index = {**self.index, "force_zeros_for_empty_prompt": zeros}


class StableDiffusionXLPipeline(StableDiffusionXLBase):
    """Text to image with Stable Diffusion XL (arXiv:2307.01952).

    Args:
        vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler: the components. Without a VAE
            latents come out, without text encoders encoded prompts go in.
        force_zeros_for_empty_prompt: whether the negative half is zeros where there is no negative prompt.
    """

    @tuple_on_request
    def __call__(
        self,
        /,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
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
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        **others: Any,
    ) -> StableDiffusionXLPipelineOutput:
        """Makes pictures. Every argument is checked before any work begins.

        Args:
            prompt, negative_prompt: what the pictures show, and what they do not; a list of prompts makes one picture
                each.
            prompt_2, negative_prompt_2: the same for the second text encoder; left out, it reads the first ones.
            height, width: in pixels, divisible by 8; left out, what the model was trained at.
            prompt_embeds, negative_prompt_embeds: encoded prompts [B, N, D] in place of texts.
            pooled_prompt_embeds, negative_pooled_prompt_embeds: [B, P], the second encoder's pooled texts; they go with
                encoded prompts.
            original_size, target_size, crops_coords_top_left: (height, width), (height, width) and (top, left) in
                pixels, as the model was trained with them (arXiv:2307.01952, section 2.2); left out, the picture's
                size, and no crop.
            negative_original_size, negative_target_size, negative_crops_coords_top_left: the same for the negative
                prompt; both sizes left out, those of the prompt.
            num_inference_steps, timesteps, sigmas, guidance_scale, num_images_per_prompt, eta, generator, latents,
            output_type, return_dict, guidance_rescale, guidance_interval, clip_skip, callback_on_step_end, seed: as for
                ``StableDiffusionPipeline``.
            callback_on_step_end_tensor_inputs: which of "latents", "prompt_embeds", "negative_prompt_embeds",
                "add_text_embeds", "add_time_ids" and "pred_original_sample" it gets.

        Raises:
            InputError: an argument is wrong, or Russet lacks it.
            DoesNotFit: the pictures need more memory than the device has.
        """
        others["denoising_end"] = denoising_end
        validation.refuse_unknown(others, ELSEWHERE, "StableDiffusionXLPipeline()")
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
                clip_skip=clip_skip,
            ),
            start=NoiseStart(given=latents),
            height=height,
            width=width,
            images_per_prompt=num_images_per_prompt,
            sampling=SamplingSpec(steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas, eta=eta),
            guidance=GuidanceSpec(scale=guidance_scale, rescale=guidance_rescale, interval=guidance_interval),
            noise=NoiseSpec(seed=seed, generator=generator),
            output_type=output_type,
            callback=CallbackSpec(function=callback_on_step_end, tensors=callback_on_step_end_tensor_inputs),
        )
        return self.generate(spec)
