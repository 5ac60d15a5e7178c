"""From a config to schedules: the noise table, where the steps are, and by which solver they are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from russet.component import Component
from russet.config import field_types
from russet.errors import InputError
from russet.schedulers import arguments, noise, spacing
from russet.schedulers.brownian import Noise, draw
from russet.schedulers.configs import SchedulerConfig
from russet.schedulers.noise import Point, Table
from russet.schedulers.schedule import Border, Schedule
from russet.schedulers.solvers import Solver


class Timetable(Component):
    """The part of a scheduler that has no state. A subclass says which solver it drives and how its steps are placed.

    variance_preserving: the latents outside are x / sqrt(1 + sigma²). whole: timesteps are whole numbers.
    spare: steps that the spacing is laid out for and not made. whole_range: sigma schedules span the whole table, not
    only the spaced timesteps. order: model calls a step. options: what a run can be told, with its defaults.
    """

    config_class: ClassVar[type[SchedulerConfig]]
    config: SchedulerConfig
    order: ClassVar[int] = 1
    variance_preserving: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    spare: ClassVar[int] = 0
    whole_range: ClassVar[bool] = True
    needs_unconditional: ClassVar[bool] = False
    zero_snr: ClassVar[float] = 2.0**-24  # alphas_cumprod that stands for zero
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: Mapping[str, Any] | None = None, **changes: Any):
        """
        Args:
            config: a config of this or another scheduler, or a dict; ``changes`` are single keys, and win.

        Raises:
            ConfigError: a key that the class does not have, or a value that it cannot use.
        """
        self.config = self.config_class.of(config, changes)
        self.table = self.make_table()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> Self:
        """Makes the scheduler from another one's config: keys that both know are taken over, the others are kept.

        Raises:
            ConfigError: a value that the class cannot use.
        """
        return cls(cls.config_class.merged(config, changes, cls.__name__))

    def make_table(self) -> Table:
        rescale = self.key("rescale_betas_zero_snr", False)
        return Table(noise.betas_of(self.config), self.zero_snr if rescale else None)  # type: ignore[arg-type]

    def solver(self, steps: int, **options: Any) -> Solver:
        """The solver for a run of ``steps``; the options are those of ``self.options``."""
        raise NotImplementedError

    def border(self, **options: Any) -> Border:
        limit = None
        if self.key("thresholding", False):
            limit = thresholded(self.key("dynamic_thresholding_ratio"), self.key("sample_max_value"))
        elif self.key("clip_sample", False):
            limit = clipped(self.key("clip_sample_range"))
        return Border(self.variance_preserving, self.key("prediction_type"), limit)

    def place(self, steps: int) -> list[Point]:
        """Where ``steps`` steps start, by the config's spacing and sigma schedule."""
        train, name = self.config.num_train_timesteps, self.key("timestep_spacing", "linspace")
        even = name if name in spacing.EVEN else "linspace"
        offset, last = self.key("steps_offset", 0), train - self.clipped()
        times = spacing.timesteps(even, steps, train, last=last, offset=offset, spare=self.spare)
        by_sigma = self.sigma_schedule()
        if by_sigma is None:
            points = [self.point_at(float(t)) for t in (times.round() if self.whole else times)]
            arguments.falling(f"the noise levels of {steps} steps", [point.sigma for point in points])
            arguments.inside(f"{steps} timesteps", [points[0].t], train - 1, whole=False)
            return points
        spaced = not self.whole_range and name in spacing.EVEN  # Karras' ends are those of the spaced timesteps
        low, high = (times[-1], times[0]) if spaced else (0, train - 1)
        low = self.key("sigma_min", None) or self.table.sigma(low)
        high = self.key("sigma_max", None) or self.table.sigma(high)
        found = spacing.sigmas(by_sigma, steps, low, high, self.table)
        return [self.point_of(float(sigma), by_sigma) for sigma in found]

    def point_at(self, t: float) -> Point:
        """The point of a timestep that is given or spaced."""
        return Point(t, self.table.sigma(t))

    def point_of(self, sigma: float, schedule: str = "") -> Point:
        """The point of a noise level; a model that was trained at whole timesteps is told a whole one."""
        t = self.table.t(sigma)
        if self.whole:  # Diffusers rounds those of Karras, and cuts the others off
            t = math.floor(t) if schedule in ("exponential", "beta") else round(t)
        return Point(float(t), sigma)

    # -- schedules

    def schedule(
        self,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        **options: Any,
    ) -> Schedule:
        """Lays out a run: by the number of steps, or by the timesteps or noise levels that are given.

        Args:
            timesteps: falling, 0 .. num_train_timesteps - 1, one for each step.
            sigmas: falling noise levels, one for each step and last the one where the run ends, often 0.
            eta: how much of its noise an SDE draws anew, 0..1, for the schedulers that have it.
            options: others of ``self.options``.

        Raises:
            InputError: an argument that cannot be used.
        """
        arguments.one_of(steps=steps, timesteps=timesteps, sigmas=sigmas)
        if eta or "eta" in self.options:
            options["eta"] = eta
        options = self.read_options(options)
        if steps is not None:
            points, end = self.place(arguments.steps(steps, self.config.num_train_timesteps)), self.end()
        elif timesteps is not None:
            points, end = self.place_timesteps(arguments.numbers("timesteps", timesteps)), self.end()
        else:
            levels = arguments.numbers("sigmas", sigmas)
            if len(levels) < 2 or levels[-1] < 0:
                raise InputError(f"sigmas must be two or more, and end at 0 or above, not {levels}")
            arguments.falling("sigmas", levels)
            points, end = [self.point_of(sigma) for sigma in levels[:-1]], self.point_of(levels[-1])
        return Schedule(
            tuple(points),
            end,
            self.solver(len(points), **options),
            self.border(**options),
            self.initial_sigma(points),
            self.order,
            self.needs_unconditional,
        )

    def place_timesteps(self, timesteps: list[float]) -> list[Point]:
        if chosen := self.sigma_schedule():
            raise InputError(f"timesteps cannot be given where the config asks for the sigma schedule {chosen}")
        arguments.falling("timesteps", timesteps)
        arguments.inside("timesteps", timesteps, self.last_timestep(), self.whole)
        return [self.point_at(t) for t in timesteps]

    def end(self) -> Point:
        return Point(0.0, 0.0 if self.config.ends_at_zero else self.table.sigma(0))

    def sigma_schedule(self) -> str | None:
        """The name of the sequence of noise levels, where the config asks for one."""
        for name in ("karras", "exponential", "beta"):
            if self.key(f"use_{name}_sigmas", False):
                return name
        if self.key("use_lu_lambdas", False):
            return "lu"
        name = self.key("timestep_spacing", "linspace")
        return None if name in spacing.EVEN else name

    def starts(self, plan: Schedule) -> list[int]:
        """The calls, by number, at which a step begins: a run can start there. Others are in the middle of a step."""
        last = {id(call): number for number, call in enumerate(plan.calls)}
        return [last[id(point)] for point in plan.points if id(point) in last]

    def from_call(self, plan: Schedule, call: int) -> Schedule:
        """The rest of a plan, whose calls are the plan's own from ``call`` on.

        Raises:
            InputError: the call is in the middle of a step.
        """
        at = [step for step, point in enumerate(plan.points) if point is plan.calls[call]]
        if call not in self.starts(plan) or not at:
            raise InputError(f"call {call} is inside a step; steps begin at the calls {self.starts(plan)}")
        return plan.start_at(at[0])

    def noise_of(self, batch: int) -> Noise:
        """A source for ``step``, which says before each draw where the noise comes from."""
        return Noise(lambda: draw((), [], torch.device("cpu")))

    def clipped(self) -> int:
        """How many of the noisiest timesteps are never used: those where -log(sigma) is below lambda_min_clipped."""
        return int((-np.log(self.table.sigmas) < self.key("lambda_min_clipped", -math.inf)).sum())

    def last_timestep(self) -> float:
        return self.config.num_train_timesteps - 1

    def initial_sigma(self, points: Sequence[Point]) -> float:
        highest = max(point.sigma for point in points)
        if self.variance_preserving:
            return 1.0
        return math.sqrt(highest**2 + 1) if self.key("timestep_spacing", "linspace") == "leading" else highest

    def read_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        arguments.known(type(self).__name__, given, self.options)
        options = {**self.options, **given}
        if "eta" in options:
            options["eta"] = arguments.fraction("eta", options["eta"])
        return options

    def key(self, name: str, default: Any = None) -> Any:
        """A value of the config, if the class has it; what was kept from another class does not count."""
        return getattr(self.config, name) if name in field_types(type(self.config)) else default


def clipped(limit: float) -> Callable[[Tensor], Tensor]:
    return lambda x0: x0.clamp(-limit, limit)


def thresholded(ratio: float, most: float) -> Callable[[Tensor], Tensor]:
    """Dynamic thresholding (arXiv:2205.11487, section 2.3): each image scaled so that its ``ratio`` quantile fits."""

    def limit(x0: Tensor) -> Tensor:
        ordered = x0.abs().flatten(1).sort(dim=1).values  # torch.quantile is not there on every device
        place = ratio * (ordered.shape[1] - 1)
        low, high = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
        s = torch.lerp(low, high, place - math.floor(place)).clamp(1, most)
        s = s.view(-1, *[1] * (x0.dim() - 1))
        return x0.clamp(-s, s) / s

    return limit
