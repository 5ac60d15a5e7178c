"""Stable Diffusion 1.x and 2.x: text to image. A typed front: it builds a request and hands it to the engine."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Generator, Tensor, nn

from russet import validation
from russet.errors import ConfigError, InputError
from russet.generate import engine, overflow, safety
from russet.generate import prompt as prompts
from russet.generate.conditioning import Conditioning
from russet.generate.phase_times import Clock
from russet.generate.previews import Previews
from russet.generate.sampling import Sampling
from russet.generate.spec import Geometry, TextToImage
from russet.images.clip_processor import CLIPImageProcessor
from russet.images.conversion import as_output
from russet.models.autoencoder import Autoencoder
from russet.models.clip_text import CLIPTextModel
from russet.models.safety_checker import StableDiffusionSafetyChecker
from russet.models.tiny_vae import AutoencoderTiny
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL
from russet.pipelines.base import DiffusionPipeline, Part
from russet.pipelines.output import StableDiffusionPipelineOutput
from russet.planning.plan import Plan
from russet.planning.workload import Workload
from russet.residency import weights
from russet.residency.form import dtype_named
from russet.rng import NoiseSource
from russet.schedulers.schedule import Schedule
from russet.schedulers.scheduler import Scheduler
from russet.text.tokenizer import CLIPTokenizer

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

ELSEWHERE = {
    "cross_attention_kwargs": "there are no attention processors to pass arguments to",
    "ip_adapter_image": "IP-Adapters are not supported",
    "ip_adapter_image_embeds": "IP-Adapters are not supported",
    "callback": "use callback_on_step_end",
    "callback_steps": "use callback_on_step_end, which is called after every step",
}


class StableDiffusionPipeline(DiffusionPipeline):
    """Text to image with Stable Diffusion 1.x and 2.x (arXiv:2112.10752).

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: the components. Without a VAE latents come out, without a text
            encoder or a tokenizer encoded prompts go in.
        safety_checker, feature_extractor: look at every picture, and return those black that they flag; or None. A
            function in the checker's place is called as ``f(images=…, clip_input=…)`` and returns (images, flags).
    """

    parts: ClassVar = {
        "vae": Part(AutoencoderKL, (AutoencoderTiny,), optional=True),
        "text_encoder": Part(CLIPTextModel, optional=True),
        "tokenizer": Part(CLIPTokenizer, optional=True),
        "unet": Part(UNet2DConditionModel),
        "scheduler": Part(Scheduler),
        "safety_checker": Part(StableDiffusionSafetyChecker, optional=True, callable=True),
        "feature_extractor": Part(CLIPImageProcessor, optional=True),
    }

    vae: Autoencoder | None
    text_encoder: CLIPTextModel | None
    tokenizer: CLIPTokenizer | None
    unet: UNet2DConditionModel
    scheduler: Scheduler
    safety_checker: StableDiffusionSafetyChecker | safety.Filter | None
    feature_extractor: CLIPImageProcessor | None

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._warmed_up: torch.device | None = None
        self.finite_in: torch.dtype | None = None  # what the UNet drew the last picture in, if no value overflowed
        self._previews = Previews()
        self.interrupt = False
        if isinstance(self.known("safety_checker"), nn.Module) and self.feature_extractor is None:
            raise InputError("a safety_checker needs a feature_extractor, which prepares the pictures for it")
        if self.safety_checker is None and self.requires_safety_checker:
            log.warning("this pipeline has no safety checker: no picture is looked at before it is returned")

    @torch.no_grad()
    def __call__(
        self,
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
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Draws pictures. Every argument is checked before any work begins.

        Args:
            prompt: what to draw; a list draws one picture each.
            height, width: in pixels, divisible by 8; left out, what the model was trained at.
            num_inference_steps: at least 1; more is slower and finer, up to a point.
            timesteps, sigmas: the caller's own, descending, instead of ``num_inference_steps``.
            guidance_scale: how closely to follow the prompt; 1 and below switches guidance off (arXiv:2207.12598).
            negative_prompt: what not to draw; one text for all, or one per prompt.
            num_images_per_prompt: pictures per prompt, at least 1.
            eta: 0..1, how much noise DDIM adds again in each step (arXiv:2010.02502, eq. 16).
            generator: where the noise comes from, one ``torch.Generator`` for all pictures or a list with one each; it
                draws in the UNet's precision, as with Diffusers.
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
                "pred_original_sample" it gets. The last, the picture's latents as they are foreseen, is for previews.
            seed: one stream of noise per picture: a number (the second picture has ``seed + 1``, and so on), or one per
                picture, drawn in float32. The same seed gives the same picture on every device and in every batch.

        Raises:
            InputError: an argument is wrong, or Russet lacks it.
            DoesNotFit: the pictures need more memory than the device has.
        """
        validation.refuse_unknown(others, ELSEWHERE, "StableDiffusionPipeline()")
        validation.flag("return_dict", return_dict)
        request = TextToImage.of(
            self.geometry,
            {
                "prompt": prompt,
                "height": height,
                "width": width,
                "num_inference_steps": num_inference_steps,
                "timesteps": timesteps,
                "sigmas": sigmas,
                "guidance_scale": guidance_scale,
                "negative_prompt": negative_prompt,
                "num_images_per_prompt": num_images_per_prompt,
                "eta": eta,
                "generator": generator,
                "latents": latents,
                "prompt_embeds": prompt_embeds,
                "negative_prompt_embeds": negative_prompt_embeds,
                "output_type": output_type,
                "guidance_rescale": guidance_rescale,
                "guidance_interval": guidance_interval,
                "clip_skip": clip_skip,
                "callback_on_step_end": callback_on_step_end,
                "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
                "seed": seed,
            },
            both=self.scheduler.needs_unconditional,
            last_timestep=self.scheduler.table.last,
        )
        output = self.draw(request)
        return output if return_dict else output.to_tuple()

    def draw(self, request: TextToImage) -> StableDiffusionPipelineOutput:
        """Carries a checked request out: text, denoising, decoding."""
        schedule = self.scheduler.schedule(
            request.steps, timesteps=request.timesteps, sigmas=request.sigmas, eta=request.eta
        )
        plan = self.plan(
            height=request.height, width=request.width, num_images=request.images, guidance_scale=request.guidance.scale
        )
        with self.run_open():
            return self._draw(request, schedule, plan)

    def _draw(self, request: TextToImage, schedule: Schedule, plan: Plan) -> StableDiffusionPipelineOutput:
        notes = size_notes(request, plan)
        clock = Clock()
        with clock.phase("text"):
            if self.needs_warm_up(plan):
                self.encode(request, plan)  # for nothing, see prime
            conditioning = self.encode(request, plan)
        with clock.phase("denoise"):
            latents, more = self.denoise(request, schedule, conditioning, plan)
            notes += more
        images: Any = latents
        flags = None
        if request.output_type != "latent":
            with clock.phase("decode"):
                pixels, flags, more = self.develop(latents, plan)
                images, notes = as_output(pixels, request.output_type), notes + more
        return StableDiffusionPipelineOutput(images, flags, request.seeds, clock.seconds, plan, notes)

    def encode(self, request: TextToImage, plan: Plan) -> Conditioning:
        """The conditioning of all images, on the device. The negative half is there only where guidance is."""
        positive, negative = request.prompt_embeds, request.negative_prompt_embeds
        texts, others = request.prompts or (), (request.negatives or ()) if self.guided(request) else ()
        if request.clip_skip == 0:
            found = self.encode_texts((*texts, *others), plan)
        else:  # which is for the prompt alone, as in Diffusers
            found = (*self.encode_texts(texts, plan, request.clip_skip), *self.encode_texts(others, plan))
        if texts:
            positive = torch.stack(found[: len(texts)])
        if others:
            negative = torch.stack(found[len(texts) :])
        elif not self.guided(request):
            negative = None
        assert positive is not None
        halves = Conditioning(
            {"encoder_hidden_states": positive},
            None if negative is None else {"encoder_hidden_states": negative},
        )
        return halves.to(self.device).repeated(request.images_per_prompt)

    def encode_texts(self, texts: Sequence[str], plan: Plan, clip_skip: int = 0) -> tuple[Tensor, ...]:
        """[N, D] for each text; each different one is encoded once, all of them together."""
        if not texts:
            return ()
        assert self.tokenizer is not None
        encoder = self.known("text_encoder")
        assert encoder is not None
        different = list(dict.fromkeys(texts))
        graphs = self.graphs if plan["cuda_graphs"] and plan.text_encoder == "device" else None
        with self.at_work("text_encoder", plan):
            encoded = prompts.encode(self.tokenizer, encoder, different, clip_skip, graphs)
        return tuple(encoded[different.index(text)] for text in texts)

    def guided(self, request: TextToImage) -> bool:
        """Whether the denoiser is asked twice. One that was distilled to be told the scale itself is asked once."""
        return request.guidance.wanted and self.known("unet").config.time_cond_proj_dim is None

    def denoise(
        self, request: TextToImage, schedule: Schedule, conditioning: Conditioning, plan: Plan
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Noise → latents [B, C, h, w], and notes on what went otherwise than planned."""
        geometry = self.geometry
        shape = (request.images, geometry.channels, request.height // geometry.factor, request.width // geometry.factor)
        precision = torch.float32 if request.own_streams else dtype_named(plan.dtype("unet"))
        noise = NoiseSource(request.generators, shape, self.device, precision)
        start = noise() if request.latents is None else request.latents.to(self.device, torch.float32)
        self.interrupt = False
        self._guidance_scale = request.guidance.scale
        self._num_timesteps = len(schedule.timesteps)
        sampling = Sampling(self, request, schedule, conditioning, plan)
        if self.needs_warm_up(plan):
            self.warm_up(sampling, schedule, start, plan)
        with self.at_work("unet", plan):
            latents = sampling.from_noise(
                dataclasses.replace(noise, dtype=self.scheduler.noise_dtype(precision)), start
            )
        return latents, tuple(sampling.notes)

    def needs_warm_up(self, plan: Plan) -> bool:
        """Whether the networks' first pass on this device is still to come, and would differ from all later ones."""
        return plan.warm_up and self._warmed_up != self.device

    def warm_up(self, sampling: Sampling, schedule: Schedule, start: Tensor, plan: Plan) -> None:
        """Calls UNet and VAE once for nothing: on some torch versions the first pass is unlike all later ones."""
        with self.at_work("unet", plan):
            sampling.predict(start, schedule.timesteps[0])
        sampling.aim()  # nothing of that pass is kept
        if self.known("vae") is not None:
            with self.at_work("vae", plan):
                engine.decode(self.known("vae"), start[: plan.vae_batch], plan.vae_batch)
        self._warmed_up = self.device

    def develop(self, latents: Tensor, plan: Plan) -> tuple[Tensor, list[bool] | None, tuple[str, ...]]:
        """Latents → pixels [B, 3, H, W] in [-1, 1], what the safety checker says of them, and notes."""
        with self.at_work("vae", plan):
            pixels, notes = overflow.decoded(self, latents, plan)
        return *self.check(pixels, plan), notes

    def check(self, pixels: Tensor, plan: Plan) -> tuple[Tensor, list[bool] | None]:
        """Pixels [B, 3, H, W] as they may be shown, and one flag per picture; None where nothing looked at them."""
        checker, processor = self.known("safety_checker"), self.feature_extractor
        if checker is None:
            return pixels, None
        if not isinstance(checker, nn.Module):
            return safety.filtered(checker, processor, pixels, self.dtype)
        if processor is None:
            return pixels, None
        with self.at_work("safety_checker", plan):
            return safety.checked(cast(StableDiffusionSafetyChecker, checker), processor, pixels)

    @torch.no_grad()
    def preview(self, latents: Tensor, vae: Autoencoder | None = None) -> list[Image.Image]:
        """Small pictures of latents [B, C, h, w], at almost no cost: for callbacks, one pixel for each latent.

        A linear map from latents to colours makes them, which is fitted to the pipeline's VAE at the first use; that
        encodes four pictures of 128×128. With ``vae``, an ``AutoencoderTiny`` for example, that network decodes them
        where it is, at full size; and so does the pipeline's own VAE if it is a tiny one.

        Raises:
            InputError: latents of another shape; what is not finite is shown as 0.
        """
        return self._previews.pictures(self, latents, vae)

    # -- what the components say about sizes

    @property
    def geometry(self) -> Geometry:
        """What a request is checked against.

        Raises:
            ConfigError: the components do not fit each other.
        """
        unet, vae, text = self.known("unet").config, self.known("vae"), self.known("text_encoder")
        if vae is not None and unet.in_channels != vae.config.latent_channels:
            raise ConfigError(
                f"the UNet takes {unet.in_channels} channels and the VAE's latents have {vae.config.latent_channels}: "
                "this is no text-to-image model (9 channels are for inpainting, 8 for editing by instruction)"
            )
        features = (
            unet.cross_attention_dim if isinstance(unet.cross_attention_dim, int) else unet.cross_attention_dim[0]
        )
        if text is not None and text.config.hidden_size != features:
            raise ConfigError(
                f"the UNet takes text of {features} features and the text encoder gives {text.config.hidden_size}"
            )
        sample = unet.sample_size if isinstance(unet.sample_size, tuple) else (unet.sample_size or 64,) * 2
        return Geometry(
            sample=(sample[0], sample[1]),
            channels=unet.in_channels,
            factor=8 if vae is None else vae.config.pixels_per_latent,
            features=features,
            tokens=text.config.max_position_embeddings if text is not None else 77,
            layers=text.config.num_hidden_layers if text is not None else 1,
            decodes=vae is not None,
            reads_text=text is not None and self.tokenizer is not None,
            told_scale=unet.time_cond_proj_dim is not None,
        )

    def workload(self, height: int | None, width: int | None, images: int, *, guided: bool) -> Workload:
        geometry = self.geometry
        vae, text, checker = (self.known(name) for name in ("vae", "text_encoder", "safety_checker"))
        return Workload.of(
            unet=self.known("unet").config,
            vae=None if vae is None else vae.config,
            text_encoder=None if text is None else text.config,
            safety_checker=getattr(checker, "config", None),
            height=height or geometry.sample[0] * geometry.factor,
            width=width or geometry.sample[1] * geometry.factor,
            images=images,
            rows=2 if (guided or self.scheduler.needs_unconditional) and not geometry.told_scale else 1,
            deep_branch=None if self.deep_cache is None else self.deep_cache.branch,
            parameters={name: weights.parameter_count(network) for name, network in self._networks().items()},
        )

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along an edge."""
        return self.geometry.factor

    # -- what a callback may ask about the call that runs

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1 and self.known("unet").config.time_cond_proj_dim is None

    @property
    def num_timesteps(self) -> int:
        """Model calls in all."""
        return self._num_timesteps

    @property
    def _interrupt(self) -> bool:  # the name that Diffusers' guides set from callbacks
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self.interrupt = value


def size_notes(request: TextToImage, plan: Plan) -> tuple[str, ...]:
    """A note where a picture's size is one that the device is better not given many of."""
    multiple = plan["size_multiple"]
    if request.height % multiple == 0 and request.width % multiple == 0:
        return ()
    return (
        f"{request.width}×{request.height} is no multiple of {multiple} pixels: {plan.why('size_multiple').reason}, so "
        f"prefer sizes in multiples of {multiple} for many pictures",
    )
