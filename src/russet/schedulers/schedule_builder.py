"""From a scheduler's config to schedules: the noise table, where the steps are, and the solver."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from russet import validation
from russet.component import Component
from russet.errors import InputError, UnsupportedArgument
from russet.schedulers import noise_levels
from russet.schedulers.configs import EVEN, KEYS, SchedulerConfig, config_class
from russet.schedulers.noise_levels import NoiseTable, Point
from russet.schedulers.schedule import Parameterization, Schedule, thresholded
from russet.schedulers.solvers import Solver


class ScheduleBuilder(Component):
    """The stateless part of a scheduler. A subclass defines its solver and where its steps are."""

    config_class: ClassVar[type[SchedulerConfig]]
    config: SchedulerConfig
    classes: ClassVar[list[type[ScheduleBuilder]]] = []  # all that have a config
    variance_preserving: ClassVar[bool] = True  # public latents are x / sqrt(1 + sigma²); else x, as in k-diffusion
    integer_timesteps: ClassVar[bool] = True
    extra_steps: ClassVar[int] = 0  # the spacing is that of so many more steps, whose last ones are left out
    order: ClassVar[int] = 1  # model calls a step, as Diffusers counts them
    needs_unconditional: ClassVar[bool] = False  # needs the model's output without the prompt too
    zero_snr: ClassVar[float] = 2.0**-24  # the alphas_cumprod that stands for zero
    options: ClassVar[Mapping[str, Any]] = {}  # options of a run, with defaults

    def __init_subclass__(cls, keys: Sequence[str] = (), solver: Solver | None = None, **row: Any) -> None:
        """keys: the config's; row: defaults of its own for them, and values for the attributes above.

        solver: one without options.
        """
        for name in [name for name in row if not keys or name not in KEYS]:
            if not hasattr(cls, name):
                raise TypeError(
                    f"{cls.__name__}: {name} is neither an attribute of schedulers nor one of the given keys"
                )
            setattr(cls, name, row.pop(name))
        if keys:
            cls.config_class = config_class(cls, keys, row)
        if hasattr(cls, "config_class"):
            cls.classes.append(cls)
        if solver is not None:
            cls.solver = lambda self, steps, **options: solver  # type: ignore[method-assign]

    def __init__(self, config: Mapping[str, Any] | None = None, **changes: Any):
        """config: a config of this or another scheduler, or a dict; ``changes`` are single keys, and win.

        Raises ConfigError for a key that the class does not have and for a value that it cannot use.
        """
        self.config = self.config_class.of(config, changes)
        self.key = self.config.key
        self.table = self.make_table()

    # -- what a subclass may override

    def solver(self, steps: int, **options: Any) -> Solver:
        """The solver for so many steps; the options are those of ``self.options``."""
        raise NotImplementedError

    def make_table(self) -> NoiseTable:
        return NoiseTable(
            noise_levels.betas_of(self.config), self.zero_snr if self.key("rescale_betas_zero_snr") else None
        )

    def parameterization(self, **options: Any) -> Parameterization:
        key, limit = self.key, None
        if key("thresholding"):
            limit = partial(thresholded, ratio=key("dynamic_thresholding_ratio"), most=key("sample_max_value"))
        elif key("clip_sample"):
            limit = partial(torch.clamp, min=-key("clip_sample_range"), max=key("clip_sample_range"))
        keep_noise = not options.get("use_clipped_model_output", True)
        return Parameterization(self.variance_preserving, key("prediction_type"), limit, keep_noise)

    def point(self, t: float, sigma: float, schedule: str = "") -> Point:
        """The point of a timestep and its noise level; ``schedule`` is the name of the sigma schedule they are from."""
        if self.integer_timesteps:  # Diffusers rounds the timesteps of Karras' noise levels, and truncates others
            t = math.floor(t) if schedule in ("exponential", "beta") else round(t)
        return Point(float(np.float32(t)), sigma)  # the precision of a tensor of timesteps: mps has no float64

    def point_at(self, t: float) -> Point:
        return self.point(t, self.table.sigma(t))

    def point_of(self, sigma: float, schedule: str = "") -> Point:
        return self.point(self.table.t(sigma), sigma, schedule)

    def points_for(self, steps: int) -> list[Point]:
        """Where ``steps`` steps start, by the config's spacing and sigma schedule."""
        train, name, by_sigma = self.config.num_train_timesteps, self.key("timestep_spacing"), self.sigma_schedule()
        unused = int((-np.log(self.table.sigmas) < self.key("lambda_min_clipped")).sum())
        even, offset = name if name in EVEN else "linspace", self.key("steps_offset")
        times = noise_levels.spaced_timesteps(
            even, steps, train, last=train - unused, offset=offset, extra=self.extra_steps
        )
        if by_sigma is None:
            validation.timesteps(f"the timesteps of {steps} steps", times[:1].tolist(), self.table.last)
            points = [self.point_at(float(t)) for t in (times.round() if self.integer_timesteps else times)]
            validation.falling(f"the noise levels of {steps} steps", [point.sigma for point in points])
            return points
        spaced = not self.variance_preserving and name in EVEN  # in k-diffusion they span the steps
        low, high = (self.table.sigma(t) for t in ((times[-1], times[0]) if spaced else (0, train - 1)))
        ends = self.key("sigma_min") or low, self.key("sigma_max") or high
        return [
            self.point_of(float(s), by_sigma) for s in noise_levels.spaced_sigmas(by_sigma, steps, *ends, self.table)
        ]

    def end(self) -> Point:
        """Where the last step ends: at no noise, or at the noise of timestep 0."""
        zero = self.key("final_sigmas_type") == "zero" and self.key("set_alpha_to_one")
        return Point(0.0, 0.0 if zero else self.table.sigma(0))

    def starts(self, schedule: Schedule) -> list[int]:
        """The indices of the calls at which a step starts, and so can a passage. Others are inside a step."""
        return list(schedule.starts)

    def from_call(self, schedule: Schedule, call: int) -> Schedule:
        """The schedule whose calls are those of ``schedule`` from ``call`` on."""
        if call not in (starts := self.starts(schedule)):
            raise InputError(f"call {call} is inside a step; steps start at the calls {starts}")
        return schedule.start_at(starts.index(call))

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
        """Makes a schedule: by the number of steps, or by given timesteps or noise levels.

        Args:
            timesteps: falling, 0 .. num_train_timesteps - 1, one for each step.
            sigmas: falling noise levels, one for each step and last the one at the end, often 0.
            eta: the share of its noise that an SDE draws anew, 0..1, for the schedulers that have it.
            options: others of ``self.options``.

        Raises:
            InputError: an argument that cannot be used.
        """
        options = self.read_options(options, eta)
        validation.exactly_one({"steps": steps, "timesteps": timesteps, "sigmas": sigmas})
        end = self.end()
        if timesteps is not None:
            points = self.points_at(timesteps)
        elif sigmas is not None:
            *points, end = self.points_of(sigmas)
        else:
            most = self.config.num_train_timesteps
            points = self.points_for(validation.integer("the number of steps", steps, least=1, most=most))
        solver, parameterization = self.solver(len(points), **options), self.parameterization(**options)
        initial = self.initial_sigma(points[0].sigma)
        return Schedule(tuple(points), end, solver, parameterization, initial, self.needs_unconditional)

    def points_at(self, timesteps: Sequence[float]) -> list[Point]:
        """The points of timesteps that the caller chose."""
        times = validation.numbers_list("timesteps", timesteps)
        if chosen := self.sigma_schedule():
            raise InputError(f"timesteps cannot be given where the config asks for the sigma schedule {chosen}")
        validation.falling("timesteps", times)
        validation.timesteps("timesteps", times, self.table.last, self.integer_timesteps)
        return [self.point_at(t) for t in times]

    def points_of(self, sigmas: Sequence[float]) -> list[Point]:
        """The points of noise levels that the caller chose, the end among them."""
        levels = validation.numbers_list("sigmas", sigmas)
        validation.falling("sigmas", levels)
        if len(levels) < 2 or levels[-1] < 0:
            raise InputError(f"sigmas must be two or more, and end at 0 or above, not {levels}")
        return [self.point_of(sigma) for sigma in levels]

    def sigma_schedule(self) -> str | None:
        """The name of the sigma schedule that the config asks for; None for evenly spaced timesteps."""
        for name in ("karras", "exponential", "beta"):
            if self.key(f"use_{name}_sigmas"):
                return name
        name = self.key("timestep_spacing")
        return "lu" if self.key("use_lu_lambdas") else None if name in EVEN else str(name)

    def initial_sigma(self, highest: float) -> float:
        """The factor that makes standard normal noise a start at a noise level, as in Diffusers."""
        if self.variance_preserving:
            return 1.0
        return math.sqrt(highest**2 + 1) if self.key("timestep_spacing") == "leading" else highest

    def read_options(self, given: Mapping[str, Any], eta: float | None) -> dict[str, Any]:
        """The options of a run, defaults included. An eta of 0 is accepted by schedulers without the option."""
        options = {**self.options, **given}
        if eta is not None and (eta != 0 or "eta" in self.options):
            options["eta"] = validation.number("eta", eta, least=0, most=1)
        if unknown := options.keys() - self.options.keys():
            has = f"it has {', '.join(self.options) or 'no options'}"
            raise UnsupportedArgument(f"{type(self).__name__} does not take {', '.join(unknown)}; {has}")
        return options
