"""A spec against a model: everything checked and filled in, nothing computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator

from russet import validation
from russet.errors import InputError
from russet.families.family import CheckedPrompts, Family, Geometry
from russet.generate.guidance import ALWAYS, Guidance
from russet.generate.spec import GuidanceSpec, Spec
from russet.schedulers.schedule import Schedule
from russet.schedulers.scheduler import Scheduler

COMMON_TENSORS = ("latents", "negative_prompt_embeds", "pred_original_sample")


@dataclass(frozen=True, kw_only=True)
class ResolvedSpec:
    """A spec with nothing left open.

    images: B. shape: of the latents, [B, C, h, w]. guided: whether the denoiser takes two rows per image.
    schedule: the steps that are made. generators: one for the batch, one per image, or none.
    """

    spec: Spec
    geometry: Geometry
    prompts: CheckedPrompts
    images: int
    height: int
    width: int
    guidance: Guidance
    guided: bool
    schedule: Schedule
    seeds: tuple[int, ...] | None
    generators: tuple[Generator, ...]

    @property
    def own_streams(self) -> bool:
        """Whether the noise does not come from generators that the caller gave."""
        return self.seeds is not None or not self.generators

    @property
    def shape(self) -> tuple[int, int, int, int]:
        factor = self.geometry.factor
        return self.images, self.geometry.channels, self.height // factor, self.width // factor


def resolve(spec: Spec, family: Family, scheduler: Scheduler) -> ResolvedSpec:
    """Checks a spec against a pipeline's components.

    Raises:
        InputError, ArgumentTypeError: a value does not fit the model or another value.
        ConfigError: the components do not fit each other.
    """
    geometry = family.geometry
    if spec.output_type != "latent" and not geometry.decodes:
        raise InputError('this pipeline has no VAE, which makes pictures of latents: give output_type="latent"')
    guidance = Guidance(
        float(spec.guidance.scale),
        float(spec.guidance.rescale),
        scheduler.needs_unconditional,
        guided_times(spec.guidance, geometry, scheduler.table.last),
    )
    guided = guidance.wanted and not geometry.distilled
    prompts = family.check(spec.prompts, guided=guided)
    images = prompts.count * spec.images_per_prompt
    height, width = size(spec, geometry)
    seeds, generators = spec.noise.streams(images)
    names = (*COMMON_TENSORS, *family.callback_tensors)
    for name in spec.callback.tensors:
        validation.one_of("callback_on_step_end_tensor_inputs", name, names)
    sampling = spec.sampling
    own = sampling.timesteps is not None or sampling.sigmas is not None
    schedule = scheduler.schedule(
        None if own else sampling.steps, timesteps=sampling.timesteps, sigmas=sampling.sigmas, eta=float(sampling.eta)
    )
    resolved = ResolvedSpec(
        spec=spec,
        geometry=geometry,
        prompts=prompts,
        images=images,
        height=height,
        width=width,
        guidance=guidance,
        guided=guided,
        schedule=spec.start.rest_of(schedule),
        seeds=seeds,
        generators=generators,
    )
    spec.start.check(resolved.shape, geometry)
    return resolved


def guided_times(guidance: GuidanceSpec, geometry: Geometry, last_timestep: float) -> tuple[float, float]:
    """The lowest and the highest timestep that the interval leaves guided."""
    if guidance.interval is None:
        return ALWAYS
    if geometry.distilled:
        raise InputError(
            "guidance_interval makes no sense with this UNet: it was distilled to take guidance_scale as an input, and "
            "is called once at every step as it is"
        )
    start, end = guidance.interval
    return ALWAYS if (start, end) == (0, 1) else ((1 - end) * last_timestep, (1 - start) * last_timestep)


def size(spec: Spec, geometry: Geometry) -> tuple[int, int]:
    """Height and width in pixels; left out, those of the start, or what the model was trained at."""
    factor = geometry.factor
    default = spec.start.size(geometry) or (geometry.sample[0] * factor, geometry.sample[1] * factor)
    found = []
    for name, given, usual in zip(("height", "width"), (spec.height, spec.width), default, strict=True):
        value = usual if given is None else validation.integer(name, given, least=factor)
        if value % factor:
            below = value - value % factor
            raise InputError(
                f"{name} must be divisible by {factor}, not {value}; the nearest sizes are {below} and {below + factor}"
            )
        found.append(value)
    return found[0], found[1]
