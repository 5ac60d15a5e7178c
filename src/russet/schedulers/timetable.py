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
from russet.schedulers.configs import EVEN, SchedulerConfig
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

    def __init_subclass__(cls) -> None:
        if "config_class" in vars(cls):  # the config is named after its scheduler, in errors and in pickles
            made = cls.config_class
            made.__name__, made.__module__, made.__qualname__ = (
                cls.__name__,
                cls.__module__,
                f"{cls.__name__}.config_class",
            )

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

    def key(self, name: str, default: Any = None) -> Any:
        """A value of the config, if the class has it; what was kept from another class does not count."""
        return getattr(self.config, name) if name in field_types(type(self.config)) else default

    # -- what a subclass may say in its own way

    def solver(self, steps: int, **options: Any) -> Solver:
        """The solver for a run of ``steps``; the options are those of ``self.options``."""
        raise NotImplementedError

    def make_table(self) -> Table:
        rescale = self.key("rescale_betas_zero_snr", False)
        return Table(noise.betas_of(self.config), self.zero_snr if rescale else None)

    def border(self, **options: Any) -> Border:
        limit = None
        if self.key("thresholding", False):
            limit = thresholded(self.key("dynamic_thresholding_ratio"), self.key("sample_max_value"))
        elif self.key("clip_sample", False):
            limit = clipped(self.key("clip_sample_range"))
        return Border(self.variance_preserving, self.key("prediction_type", "v_prediction"), limit)

    def last_timestep(self) -> float:
        return self.config.num_train_timesteps - 1

    def point(self, t: float, sigma: float, schedule: str = "") -> Point:
        """What the model is told at a noise level whose timestep is ``t``; ``schedule`` names where it comes from."""
        if self.whole:  # Diffusers rounds the timesteps of Karras' noise levels, and cuts those of others off
            t = math.floor(t) if schedule in ("exponential", "beta") else round(t)
        return Point(float(t), sigma)

    def point_at(self, t: float) -> Point:
        return self.point(t, self.table.sigma(t))

    def point_of(self, sigma: float, schedule: str = "") -> Point:
        return self.point(self.table.t(sigma), sigma, schedule)

    def place(self, steps: int) -> list[Point]:
        """Where ``steps`` steps start, by the config's spacing and sigma schedule."""
        train, name = self.config.num_train_timesteps, self.key("timestep_spacing", "linspace")
        unused = int((-np.log(self.table.sigmas) < self.key("lambda_min_clipped", -math.inf)).sum())
        even = name if name in EVEN else "linspace"
        offset = self.key("steps_offset", 0)
        times = spacing.timesteps(even, steps, train, last=train - unused, offset=offset, spare=self.spare)
        if (by_sigma := self.sigma_schedule()) is None:
            arguments.inside(f"the timesteps of {steps} steps", times[:1].tolist(), train - 1)
            points = [self.point_at(float(t)) for t in (times.round() if self.whole else times)]
            arguments.falling(f"the noise levels of {steps} steps", [point.sigma for point in points])
            return points
        spaced = not self.whole_range and name in EVEN
        low, high = (times[-1], times[0]) if spaced else (0, train - 1)
        low = self.key("sigma_min") or self.table.sigma(low)
        high = self.key("sigma_max") or self.table.sigma(high)
        levels = spacing.sigmas(by_sigma, steps, low, high, self.table)
        return [self.point_of(float(sigma), by_sigma) for sigma in levels]

    def end(self) -> Point:
        """Where the last step goes: to no noise at all, or to the noise of timestep 0."""
        zero = self.key("final_sigmas_type", "zero") == "zero" and self.key("set_alpha_to_one", True)
        return Point(0.0, 0.0 if zero else self.table.sigma(0))

    def starts(self, plan: Schedule) -> list[int]:
        """The calls, by number, at which a step begins: a run can start there. Others are in the middle of a step."""
        last = {id(call): number for number, call in enumerate(plan.calls)}
        return [last[id(point)] for point in plan.points]

    def from_call(self, plan: Schedule, call: int) -> Schedule:
        """The rest of a plan, whose calls are the plan's own from ``call`` on.

        Raises:
            InputError: the call is in the middle of a step.
        """
        starts = self.starts(plan)
        if call not in starts:
            raise InputError(f"call {call} is inside a step; steps begin at the calls {starts}")
        return plan.start_at(starts.index(call))

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
        options = self.read_options({**options, "eta": eta} if eta or "eta" in self.options else options)
        end = self.end()
        if steps is not None:
            points = self.place(arguments.steps(steps, self.config.num_train_timesteps))
        elif timesteps is not None:
            points = self._place_timesteps(arguments.numbers("timesteps", timesteps))
        else:
            *levels, last = arguments.numbers("sigmas", sigmas)
            arguments.falling("sigmas", [*levels, last])
            if not levels or last < 0:
                raise InputError(f"sigmas must be two or more, and end at 0 or above, not {[*levels, last]}")
            points, end = [self.point_of(sigma) for sigma in levels], self.point_of(last)
        solver, border = self.solver(len(points), **options), self.border(**options)
        initial = self.initial_sigma(points[0].sigma)
        return Schedule(tuple(points), end, solver, border, initial, self.order, self.needs_unconditional)

    def _place_timesteps(self, timesteps: list[float]) -> list[Point]:
        if chosen := self.sigma_schedule():
            raise InputError(f"timesteps cannot be given where the config asks for the sigma schedule {chosen}")
        arguments.falling("timesteps", timesteps)
        arguments.inside("timesteps", timesteps, self.last_timestep(), self.whole)
        return [self.point_at(t) for t in timesteps]

    def sigma_schedule(self) -> str | None:
        """The name of the sequence of noise levels, where the config asks for one."""
        for name in ("karras", "exponential", "beta"):
            if self.key(f"use_{name}_sigmas", False):
                return name
        name = self.key("timestep_spacing", "linspace")
        return "lu" if self.key("use_lu_lambdas", False) else None if name in EVEN else str(name)

    def initial_sigma(self, highest: float) -> float:
        """What standard normal noise is multiplied with to start from a noise level, as Diffusers does."""
        if self.variance_preserving:
            return 1.0
        return math.sqrt(highest**2 + 1) if self.key("timestep_spacing", "linspace") == "leading" else highest

    def read_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        arguments.known(type(self).__name__, given, self.options)
        options = {**self.options, **given}
        if "eta" in options:
            options["eta"] = arguments.fraction("eta", options["eta"])
        return options


def clipped(limit: float) -> Callable[[Tensor], Tensor]:
    return lambda x0: x0.clamp(-limit, limit)


def thresholded(ratio: float, most: float) -> Callable[[Tensor], Tensor]:
    """Dynamic thresholding (arXiv:2205.11487, section 2.3): each image scaled so that its ``ratio`` quantile fits."""

    def limit(x0: Tensor) -> Tensor:
        ordered = x0.abs().flatten(1).sort(dim=1).values  # not every torch has quantile and lerp on mps
        place = ratio * (ordered.shape[1] - 1)
        low, high = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
        s = (low + (high - low) * (place - math.floor(place))).clamp(1, most).view(-1, *[1] * (x0.dim() - 1))
        return torch.maximum(torch.minimum(x0, s), -s) / s

    return limit
