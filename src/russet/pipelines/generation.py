"""What all pipelines that make pictures share: runs, and what callbacks ask about them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Generic, Literal, Protocol, TypeVar, cast, overload

import torch
from torch import Tensor
from typing_extensions import ParamSpec

from russet import validation
from russet.families.family import Family, Geometry
from russet.generate.previews import Previews
from russet.generate.run import OpenRuns, Run, current_run
from russet.generate.spec import Spec
from russet.models.autoencoder import Autoencoder
from russet.models.unet import UNet2DConditionModel
from russet.pipelines.base import DiffusionPipeline
from russet.planning.plan_types import COMPONENTS, decided_as
from russet.planning.workload import Workload
from russet.residency import weights
from russet.schedulers.scheduler import Scheduler

if TYPE_CHECKING:
    from PIL import Image

Output = TypeVar("Output")


class SupportsTuple(Protocol):
    """What a call returns."""

    def to_tuple(self) -> tuple[Any, ...]: ...


@dataclass(frozen=True)
class LatestCall:
    """What the pipeline's attributes say outside of callbacks: about the call that began last."""

    guidance_scale: float = 1.0
    num_timesteps: int = 0


P = ParamSpec("P")
Made = TypeVar("Made", bound=SupportsTuple, covariant=True)


class Call(Protocol[P, Made]):
    """A pipeline's call: its output, or with ``return_dict=False`` that as a tuple."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # P has return_dict too, as any bool
        self, *args: Any, return_dict: Literal[False], **kwargs: Any
    ) -> tuple[Any, ...]: ...

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Made: ...


def tuple_on_request(method: Callable[Concatenate[Any, P], Made]) -> Call[P, Made]:
    """Gives a pipeline's call the meaning of its argument ``return_dict``, and type checkers its two results."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        validation.flag("return_dict", return_dict)
        output = method(self, *args, **kwargs)
        return output if return_dict else output.to_tuple()

    return cast("Call[P, Made]", call)


class GenerationPipeline(DiffusionPipeline, Generic[Output]):
    """A pipeline whose ``start`` begins a run: a family of models, and what it makes of a spec.

    family: how texts become conditioning. output: makes what a call returns.
    """

    family_class: ClassVar[type[Family]]
    output: ClassVar[Callable[..., Any]]

    unet: UNet2DConditionModel
    vae: Autoencoder | None
    scheduler: Scheduler

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self.finite_in: torch.dtype | None = None  # the UNet's precision in the last picture, if nothing overflowed
        self.warmed_up: torch.device | None = None
        self._previews = Previews()
        self._latest = LatestCall()
        self._open = OpenRuns()

    @property
    def family(self) -> Family:
        return self.family_class(self.known, self.index)

    def start(self, spec: Spec) -> Run[Output]:
        """Checks and plans a call; nothing is computed before the run is iterated or asked for its result.

        Raises:
            InputError, ArgumentTypeError: the spec does not fit the pipeline.
            DoesNotFit: the work needs more memory than the device has.
        """
        run: Run[Output] = Run(self, self.family, spec, type(self).output)
        self._latest = LatestCall(run.guidance_scale, run.num_timesteps)
        self._open.add(run)
        return run

    def generate(self, spec: Spec) -> Output:
        """A run from its start to its result."""
        with self.start(spec) as run:
            return run.result()

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

    # -- what a run needs

    def workload(
        self, height: int | None, width: int | None, images: int, *, guided: bool, encodes: bool = False
    ) -> Workload:
        family, geometry = self.family, self.geometry
        return family.workload(
            height=height or geometry.sample[0] * geometry.factor,
            width=width or geometry.sample[1] * geometry.factor,
            images=images,
            rows=2 if (guided or self.scheduler.needs_unconditional) and not geometry.distilled else 1,
            encodes=encodes,
            parameters=self._parameters(),
            deep_branch=None if self.deep_cache is None else self.deep_cache.branch,
        )

    def _parameters(self) -> dict[str, int]:
        """Numbers of parameters by component, both text encoders together."""
        found = dict.fromkeys(COMPONENTS, 0)
        for name, network in self._networks().items():
            found[decided_as(name)] += weights.parameter_count(network)
        return found

    @property
    def geometry(self) -> Geometry:
        """What the components say about sizes.

        Raises:
            ConfigError: the components do not fit each other.
        """
        return self.family.geometry

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along an edge."""
        return self.geometry.factor

    # -- what a callback may ask about its run, and change; elsewhere they are about the call that began last

    @property
    def guidance_scale(self) -> float:
        run = current_run(self)
        return self._latest.guidance_scale if run is None else run.guidance_scale

    @property
    def _guidance_scale(self) -> float:  # the name that Diffusers' guides set from callbacks
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float) -> None:
        if (run := current_run(self)) is not None:
            run.guidance_scale = scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance_scale > 1 and self.known("unet").config.time_cond_proj_dim is None

    @property
    def num_timesteps(self) -> int:
        """Model calls in all."""
        run = current_run(self)
        return self._latest.num_timesteps if run is None else run.num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the run of this callback is to end before its next step; elsewhere, whether an open run is.

        Set from a callback it is about that callback's run. Set from anywhere else, True ends all runs that are open
        now, and none that begins later.
        """
        run = current_run(self)
        return any(one.stopped for one in self._open if not one.closed) if run is None else run.stopped

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        run = current_run(self)
        for one in [*self._open] if run is None else [run]:
            one.interrupt = value

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self.interrupt = value
