"""What one call of a text-to-image pipeline asks for, checked before any work begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor

from russet import validation
from russet.errors import ArgumentTypeError, InputError
from russet.generate.guidance import ALWAYS, Guidance
from russet.rng import generators_of

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds", "pred_original_sample")
SEED_END = 2**63  # seeds count up by one per image and must stay within what torch takes


@dataclass(frozen=True)
class Geometry:
    """What the components say about sizes: the request is checked against it.

    sample: latents' default height and width. channels: of the latents. factor: pixels per latent along an edge.
    tokens: N of the conditioning. features: D of the conditioning. layers: of the text encoder.
    reads_text: whether there is a text encoder. decodes: whether there is a VAE.
    told_scale: whether the UNet was distilled to be told guidance's scale.
    """

    sample: tuple[int, int]
    channels: int
    factor: int
    tokens: int
    features: int
    layers: int
    reads_text: bool = True
    decodes: bool = True
    told_scale: bool = False


@dataclass(frozen=True, kw_only=True)
class TextToImage:
    """A checked request, made by ``TextToImage.of``; the fields mean what the pipeline's arguments do."""

    prompts: tuple[str, ...] | None
    negatives: tuple[str, ...] | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    images_per_prompt: int
    height: int
    width: int
    steps: int | None
    timesteps: tuple[float, ...] | None
    sigmas: tuple[float, ...] | None
    eta: float
    guidance: Guidance
    clip_skip: int
    generators: tuple[Generator, ...]
    seeds: tuple[int, ...] | None
    latents: Tensor | None
    output_type: str
    callback: Callable[..., Any] | None
    callback_tensors: tuple[str, ...] = field(default=("latents",))

    @property
    def prompt_count(self) -> int:
        return len(self.prompts) if self.prompts is not None else len(self.prompt_embeds)  # type: ignore[arg-type]

    @property
    def images(self) -> int:
        """B: how many pictures the call makes."""
        return self.prompt_count * self.images_per_prompt

    @property
    def own_streams(self) -> bool:
        """Whether the noise does not come from generators that the caller gave."""
        return self.seeds is not None or not self.generators

    @classmethod
    def of(
        cls, geometry: Geometry, given: dict[str, Any], *, both: bool = False, last_timestep: float = 999
    ) -> TextToImage:
        """Checks the pipeline's arguments ``given`` and returns the request that they make.

        ``both``: whether the solver always needs guidance's two answers (CFG++). ``last_timestep``: the noisiest.

        Raises:
            InputError, ArgumentTypeError: an argument has a wrong value or type, or does not go with another.
        """
        guidance = Guidance(
            validation.number("guidance_scale", given["guidance_scale"]),
            validation.number("guidance_rescale", given["guidance_rescale"], least=0.0, most=1.0),
            both,
            read_guided_times(given, geometry, last_timestep),
        )
        prompts, negatives = read_prompts(given)
        embeds, negative_embeds = read_embeds(given, geometry)
        check_texts(geometry, prompts, embeds, negatives if guidance.wanted else None)
        count = len(prompts) if prompts is not None else len(embeds)  # type: ignore[arg-type]
        each = validation.integer("num_images_per_prompt", given["num_images_per_prompt"], least=1)
        height, width = read_size(given, geometry)
        steps, timesteps, sigmas = read_schedule(given)
        seeds, generators = read_noise(given, count * each)
        latents = given["latents"]
        if latents is not None:
            shape = (count * each, geometry.channels, height // geometry.factor, width // geometry.factor)
            validation.tensor("latents", latents, shape)
        output_type = validation.one_of("output_type", given["output_type"], OUTPUT_TYPES)
        if output_type != "latent" and not geometry.decodes:
            raise InputError('this pipeline has no VAE, which makes pictures of latents: give output_type="latent"')
        callback = given["callback_on_step_end"]
        return cls(
            prompts=prompts,
            negatives=negatives,
            prompt_embeds=embeds,
            negative_prompt_embeds=negative_embeds,
            images_per_prompt=each,
            height=height,
            width=width,
            steps=steps,
            timesteps=timesteps,
            sigmas=sigmas,
            eta=validation.number("eta", given["eta"], least=0.0, most=1.0),
            guidance=guidance,
            clip_skip=validation.integer("clip_skip", given["clip_skip"] or 0, least=0, most=geometry.layers - 1),
            generators=generators,
            seeds=seeds,
            latents=latents,
            output_type=output_type,
            callback=None if callback is None else validation.function("callback_on_step_end", callback),
            callback_tensors=read_callback_tensors(given["callback_on_step_end_tensor_inputs"]),
        )


def read_guided_times(given: dict[str, Any], geometry: Geometry, last_timestep: float) -> tuple[float, float]:
    """The timesteps, lowest and highest, that guidance's interval leaves guided."""
    if given["guidance_interval"] is None:
        return ALWAYS
    if geometry.told_scale:
        raise InputError(
            "guidance_interval makes no sense with this UNet: it was distilled to be told guidance_scale, and is asked "
            "once at every step as it is"
        )
    start, end = validation.span("guidance_interval", given["guidance_interval"])
    return ALWAYS if (start, end) == (0, 1) else ((1 - end) * last_timestep, (1 - start) * last_timestep)


def read_prompts(given: dict[str, Any]) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """The prompts and as many negative prompts, "" where none was given."""
    if (given["prompt"] is None) == (given["prompt_embeds"] is None):
        raise InputError(
            "give either prompt or prompt_embeds, "
            + ("and not both" if given["prompt"] is not None else "since nothing says what to draw")
        )
    if given["negative_prompt"] is not None and given["negative_prompt_embeds"] is not None:
        raise InputError("give either negative_prompt or negative_prompt_embeds, and not both")
    prompts = None if given["prompt"] is None else tuple(validation.texts("prompt", given["prompt"]))
    count = len(prompts) if prompts is not None else rows_of(given["prompt_embeds"])
    if given["negative_prompt_embeds"] is not None:
        return prompts, None
    negative = given["negative_prompt"]
    if negative is None or isinstance(negative, str):
        return prompts, (negative or "",) * count
    negatives = validation.texts("negative_prompt", negative)
    if len(negatives) != count:
        raise InputError(f"negative_prompt must be one text or {count}, as many as prompts, not {len(negatives)}")
    return prompts, tuple(negatives)


def rows_of(value: Any) -> int:
    return value.shape[0] if isinstance(value, Tensor) and value.dim() > 0 else 1


def read_embeds(given: dict[str, Any], geometry: Geometry) -> tuple[Tensor | None, Tensor | None]:
    """Ready-made conditioning, [count, N, D] each. N may be any length, but the two must agree."""
    positive, negative = given["prompt_embeds"], given["negative_prompt_embeds"]
    if positive is not None:
        validation.tensor("prompt_embeds", positive, (None, None, geometry.features))
        if 0 in positive.shape:
            raise InputError(f"prompt_embeds is empty: its shape is {list(positive.shape)}")
    if negative is not None:
        count = rows_of(positive) if positive is not None else len(validation.texts("prompt", given["prompt"]))
        tokens = positive.shape[1] if positive is not None else geometry.tokens
        validation.tensor("negative_prompt_embeds", negative, (count, tokens, geometry.features))
    return positive, negative


def check_texts(
    geometry: Geometry, prompts: tuple[str, ...] | None, embeds: Tensor | None, negatives: tuple[str, ...] | None
) -> None:
    """Raises InputError where a text is to be encoded and cannot be, or would not go with the embeddings."""
    if not geometry.reads_text and (prompts is not None or negatives is not None):
        raise InputError(
            "this pipeline has no text encoder or no tokenizer: give prompt_embeds and, for guidance, "
            "negative_prompt_embeds instead of texts"
        )
    if embeds is not None and negatives is not None and embeds.shape[1] != geometry.tokens:
        raise InputError(
            f"prompt_embeds has {embeds.shape[1]} tokens and an encoded negative prompt {geometry.tokens}: "
            "give negative_prompt_embeds of the same length"
        )


def read_size(given: dict[str, Any], geometry: Geometry) -> tuple[int, int]:
    """Height and width in pixels; left out, what the model was trained at."""
    size = []
    for name, default in zip(("height", "width"), geometry.sample, strict=True):
        value = given[name]
        value = default * geometry.factor if value is None else validation.integer(name, value, least=geometry.factor)
        if value % geometry.factor:
            below = value - value % geometry.factor
            raise InputError(
                f"{name} must be divisible by {geometry.factor}, not {value}; "
                f"the nearest sizes are {below} and {below + geometry.factor}"
            )
        size.append(value)
    return size[0], size[1]


def read_schedule(
    given: dict[str, Any],
) -> tuple[int | None, tuple[float, ...] | None, tuple[float, ...] | None]:
    """Either a number of steps or the caller's own timesteps or sigmas."""
    if given["timesteps"] is not None and given["sigmas"] is not None:
        raise InputError("give either timesteps or sigmas, and not both")
    for name in ("timesteps", "sigmas"):
        if given[name] is not None:
            points = tuple(validation.numbers_list(name, given[name]))
            return None, points if name == "timesteps" else None, points if name == "sigmas" else None
    return validation.integer("num_inference_steps", given["num_inference_steps"], least=1), None, None


def read_noise(given: dict[str, Any], images: int) -> tuple[tuple[int, ...] | None, tuple[Generator, ...]]:
    """The seeds, where there are some, and the generators: one for the batch, one per image, or none."""
    seed, generator = given["seed"], given["generator"]
    if seed is not None and generator is not None:
        raise InputError("give either seed or generator, and not both")
    if seed is not None:
        seeds = read_seeds(seed, images)
        return seeds, generators_of(seeds)
    return None, validation.generators(generator, images)


def read_seeds(seed: Any, images: int) -> tuple[int, ...]:
    """One seed per image. A single number counts up: the second picture has ``seed + 1``, and so on."""
    if not isinstance(seed, (list, tuple)):
        first = validation.integer("seed", seed, least=0, most=SEED_END - images)
        return tuple(range(first, first + images))
    if len(seed) != images:
        raise InputError(f"seed is a list of {len(seed)}, but the call makes {images} pictures; give one for each")
    return tuple(validation.integer(f"seed[{i}]", one, least=0, most=SEED_END - 1) for i, one in enumerate(seed))


def read_callback_tensors(names: Any) -> tuple[str, ...]:
    if not isinstance(names, (list, tuple)):
        raise ArgumentTypeError(f"callback_on_step_end_tensor_inputs must be a list, not {validation.shown(names)}")
    for name in names:
        validation.one_of("callback_on_step_end_tensor_inputs", name, CALLBACK_TENSORS)
    return tuple(names)
