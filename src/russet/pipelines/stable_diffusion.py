"""Stable Diffusion 1.x and 2.x: text to image."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Generator, Tensor, nn

from russet import validation
from russet.errors import InputError
from russet.families.sd import Prompts, StableDiffusion
from russet.generate import safety
from russet.generate.spec import CallbackSpec, GuidanceSpec, NoiseSpec, SamplingSpec, Spec
from russet.generate.starts import NoiseStart
from russet.images.clip_processor import CLIPImageProcessor
from russet.models.autoencoder import Autoencoder
from russet.models.clip_text import CLIPTextModel
from russet.models.safety_checker import StableDiffusionSafetyChecker
from russet.models.tiny_vae import AutoencoderTiny
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL
from russet.pipelines.base import Part
from russet.pipelines.generation import GenerationPipeline, tuple_on_request
from russet.pipelines.output import StableDiffusionPipelineOutput
from russet.schedulers.scheduler import Scheduler
from russet.text.tokenizer import CLIPTokenizer

log = logging.getLogger(__name__)

ELSEWHERE = {
    "cross_attention_kwargs": "there are no attention processors to pass arguments to",
    "ip_adapter_image": "IP-Adapters are not supported",
    "ip_adapter_image_embeds": "IP-Adapters are not supported",
    "callback": "use callback_on_step_end",
    "callback_steps": "use callback_on_step_end, which is called after every step",
}
"""Arguments of Diffusers' calls that Russet lacks, each with what to do instead."""

PARTS = {
    "vae": Part(AutoencoderKL, (AutoencoderTiny,), optional=True),
    "text_encoder": Part(CLIPTextModel, optional=True),
    "tokenizer": Part(CLIPTokenizer, optional=True),
    "unet": Part(UNet2DConditionModel),
    "scheduler": Part(Scheduler),
    "safety_checker": Part(StableDiffusionSafetyChecker, optional=True, callable=True),
    "feature_extractor": Part(CLIPImageProcessor, optional=True),
}


class StableDiffusionBase(GenerationPipeline[StableDiffusionPipelineOutput]):
    """The components of Stable Diffusion 1.x and 2.x."""

    parts: ClassVar = PARTS
    family_class = StableDiffusion
    output = StableDiffusionPipelineOutput

    vae: Autoencoder | None
    text_encoder: CLIPTextModel | None
    tokenizer: CLIPTokenizer | None
    unet: UNet2DConditionModel
    scheduler: Scheduler
    safety_checker: StableDiffusionSafetyChecker | safety.Filter | None
    feature_extractor: CLIPImageProcessor | None

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        if isinstance(self.known("safety_checker"), nn.Module) and self.feature_extractor is None:
            raise InputError("a safety_checker needs a feature_extractor, which prepares the pictures for it")
        if self.known("safety_checker") is None and self.requires_safety_checker:
            log.warning("this pipeline has no safety checker: no picture is looked at before it is returned")


class StableDiffusionPipeline(StableDiffusionBase):
    """Text to image with Stable Diffusion 1.x and 2.x (arXiv:2112.10752).

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: the components. Without a VAE latents come out, without a text
            encoder or a tokenizer encoded prompts go in.
        safety_checker, feature_extractor: look at every picture, and return those black that they flag; or None. A
            function in the checker's place is called as ``f(images=…, clip_input=…)`` and returns (images, flags).
    """

    @tuple_on_request
    def __call__(
        self,
        /,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
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
        """Makes pictures. Every argument is checked before any work begins.

        Args:
            prompt: what the pictures show; a list makes one picture each.
            height, width: in pixels, divisible by 8; left out, what the model was trained at.
            num_inference_steps: at least 1; more is slower and finer, up to a point.
            timesteps, sigmas: the caller's own, descending, instead of ``num_inference_steps``.
            guidance_scale: how closely to follow the prompt; 1 and below switches guidance off (arXiv:2207.12598).
            negative_prompt: what they do not show; one text for all, or one per prompt.
            num_images_per_prompt: pictures per prompt, at least 1.
            eta: 0..1, how much noise DDIM adds again in each step (arXiv:2010.02502, eq. 16).
            generator: where the noise comes from, one ``torch.Generator`` for all pictures or a list with one each.
            latents: the starting noise itself, [B, C, h, w], standard normal.
            prompt_embeds, negative_prompt_embeds: encoded prompts [B, N, D] in place of texts.
            output_type: "pil", "np" ([B, H, W, 3] in 0..1), "pt" ([B, 3, H, W] in 0..1) or "latent".
            return_dict: False returns the tuple (images, nsfw_content_detected).
            guidance_rescale: 0..1, against overexposure from guidance (arXiv:2305.08891, section 3.4).
            guidance_interval: (start, end), the part of the noise schedule to guide in (arXiv:2404.07724); elsewhere
                the UNet is asked with the prompt alone, which is half the work. 0 is the noisiest timestep that the
                model knows and 1 the cleanest, however many steps there are: guided are the timesteps from
                (1 - end) * 999 to (1 - start) * 999, both included. None or (0, 1) guides everywhere.
            clip_skip: how many of the text encoder's last layers to leave out for the prompt.
            callback_on_step_end: called as ``f(pipe, index, t, tensors)`` after every model call. What it returns,
                a dict of the same names, replaces those tensors.
            callback_on_step_end_tensor_inputs: which of "latents", "prompt_embeds", "negative_prompt_embeds" and
                "pred_original_sample" it gets. The last, the picture's latents as the step predicts them, is for
                previews.
            seed: one stream of noise per picture: a number (the second picture has ``seed + 1``, and so on), or one per
                picture. The same seed gives the same picture on every device and in every batch.

        Raises:
            InputError: an argument is wrong, or Russet lacks it.
            DoesNotFit: the pictures need more memory than the device has.
        """
        validation.refuse_unknown(others, ELSEWHERE, "StableDiffusionPipeline()")
        spec = Spec(
            prompts=Prompts(
                prompt=prompt,
                negative_prompt=negative_prompt,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
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
