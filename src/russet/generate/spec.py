"""What one call asks for: typed, frozen, and checked before any work begins.

Each part checks, when it is made, what can be checked without the model; ``resolve`` checks it against the model's
components, and fills in what was left open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Generator

from russet import validation
from russet.errors import ArgumentTypeError, InputError
from russet.generate.starts import NoiseStart, Start
from russet.rng import generators_of

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SEED_END = 2**63  # seeds count up by one per image and must stay within what torch takes

Callback = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """Which steps are made: a number of them, or the caller's own timesteps or sigmas.

    eta: 0..1, how much noise DDIM adds again in each step (arXiv:2010.02502, eq. 16).
    """

    steps: int = 50
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.timesteps is not None and self.sigmas is not None:
            raise InputError("give either timesteps or sigmas, and not both")
        for name in ("timesteps", "sigmas"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(validation.numbers_list(name, getattr(self, name))))
        if self.timesteps is None and self.sigmas is None:
            validation.integer("num_inference_steps", self.steps, least=1)
        validation.number("eta", self.eta, least=0.0, most=1.0)


@dataclass(frozen=True, kw_only=True)
class GuidanceSpec:
    """Classifier-free guidance. interval: (start, end), the part of the noise schedule that is guided."""

    scale: float = 7.5
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        validation.number("guidance_scale", self.scale)
        validation.number("guidance_rescale", self.rescale, least=0.0, most=1.0)
        if self.interval is not None:
            object.__setattr__(self, "interval", validation.span("guidance_interval", self.interval))


@dataclass(frozen=True, kw_only=True)
class NoiseSpec:
    """Where random numbers come from: seeds (a number counts up, one per image), or generators (one, or one each)."""

    seed: int | Sequence[int] | None = None
    generator: Generator | Sequence[Generator] | None = None

    def __post_init__(self) -> None:
        if self.seed is not None and self.generator is not None:
            raise InputError("give either seed or generator, and not both")

    def streams(self, images: int) -> tuple[tuple[int, ...] | None, tuple[Generator, ...]]:
        """The seeds, where there are some, and the generators: one for the batch, one per image, or none."""
        if self.seed is None:
            return None, validation.generators(self.generator, images)
        seeds = read_seeds(self.seed, images)
        return seeds, generators_of(seeds)


@dataclass(frozen=True, kw_only=True)
class CallbackSpec:
    """A function that is called as ``f(pipe, index, t, tensors)`` after every model call, and the tensors it gets."""

    function: Callback | None = None
    tensors: Sequence[str] = ("latents",)

    def __post_init__(self) -> None:
        if self.function is not None:
            validation.function("callback_on_step_end", self.function)
        if not isinstance(self.tensors, (list, tuple)):
            came = validation.shown(self.tensors)
            raise ArgumentTypeError(f"callback_on_step_end_tensor_inputs must be a list, not {came}")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One call. The fields mean what the arguments of a pipeline do.

    prompts: of the class that the pipeline's family takes, ``families.sd.Prompts`` for example.
    start: what the latents begin as.
    height, width: in pixels; left out, as large as the start is or as the model was trained at.

    Raises:
        InputError, ArgumentTypeError: a value that is wrong for any model.
    """

    prompts: Any
    start: Start = field(default_factory=NoiseStart)
    height: int | None = None
    width: int | None = None
    images_per_prompt: int = 1
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    guidance: GuidanceSpec = field(default_factory=GuidanceSpec)
    noise: NoiseSpec = field(default_factory=NoiseSpec)
    output_type: str = "pil"
    callback: CallbackSpec = field(default_factory=CallbackSpec)

    def __post_init__(self) -> None:
        validation.integer("num_images_per_prompt", self.images_per_prompt, least=1)
        validation.one_of("output_type", self.output_type, OUTPUT_TYPES)


def read_seeds(seed: Any, images: int) -> tuple[int, ...]:
    """One seed per image. A single number counts up: the second picture has ``seed + 1``, and so on."""
    if not isinstance(seed, (list, tuple)):
        first = validation.integer("seed", seed, least=0, most=SEED_END - images)
        return tuple(range(first, first + images))
    if len(seed) != images:
        raise InputError(f"seed is a list of {len(seed)}, but the call makes {images} pictures; give one for each")
    return tuple(validation.integer(f"seed[{i}]", one, least=0, most=SEED_END - 1) for i, one in enumerate(seed))
