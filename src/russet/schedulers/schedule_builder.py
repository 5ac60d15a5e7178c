"""From a config to schedules: the noise table, where the steps are, and by which solver they are made."""

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
from russet.schedulers import noise, spacing
from russet.schedulers.configs import EVEN, KEYS, SchedulerConfig, config_class
from russet.schedulers.noise import Point, Table
from russet.schedulers.schedule import Border, Schedule, thresholded
from russet.schedulers.solvers import Solver


class Timetable(Component):
    """The part of a scheduler without state. A subclass says which solver it drives and how its steps are placed."""

    config_class: ClassVar[type[SchedulerConfig]]
    config: SchedulerConfig
    classes: ClassVar[list[type[Timetable]]] = []  # all that have a config
    variance_preserving: ClassVar[bool] = True  # the latents outside are x / sqrt(1 + sigma²); else as k-diffusion's
    whole: ClassVar[bool] = True  # timesteps are whole numbers
    spare: ClassVar[int] = 0  # steps that the spacing is laid out for and not made
    order: ClassVar[int] = 1  # model calls a step, as Diffusers counts them
    needs_unconditional: ClassVar[bool] = False  # asks for the model's output without the prompt too
    zero_snr: ClassVar[float] = 2.0**-24  # the alphas_cumprod that stands for zero
    options: ClassVar[Mapping[str, Any]] = {}  # what a run can be told, with defaults

    def __init_subclass__(cls, keys: Sequence[str] = (), solver: Solver | None = None, **row: Any) -> None:
        """keys: the config's; row: their defaults that are not the usual ones, and any of the attributes above.

        solver: one that needs to know no more than what it is called with.
        """
        for name in [name for name in row if not keys or name not in KEYS]:
            if not hasattr(cls, name):
                raise TypeError(f"{cls.__name__}: {name} is no attribute of schedulers, nor one of the given keys")
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

    # -- what a subclass may say in its own way

    def solver(self, steps: int, **options: Any) -> Solver:
        """The solver for a run of ``steps``; the options are those of ``self.options``."""
        raise NotImplementedError

    def make_table(self) -> Table:
        return Table(noise.betas_of(self.config), self.zero_snr if self.key("rescale_betas_zero_snr") else None)

    def border(self, **options: Any) -> Border:
        key, limit = self.key, None
        if key("thresholding"):
            limit = partial(thresholded, ratio=key("dynamic_thresholding_ratio"), most=key("sample_max_value"))
        elif key("clip_sample"):
            limit = partial(torch.clamp, min=-key("clip_sample_range"), max=key("clip_sample_range"))
        keeps_noise = not options.get("use_clipped_model_output", True)
        return Border(self.variance_preserving, key("prediction_type"), limit, keeps_noise)

    def point(self, t: float, sigma: float, schedule: str = "") -> Point:
        """What the model is told at a noise level whose timestep is ``t``; ``schedule`` names where it comes from."""
        if self.whole:  # Diffusers rounds the timesteps of Karras' noise levels, and cuts those of others off
            t = math.floor(t) if schedule in ("exponential", "beta") else round(t)
        return Point(float(np.float32(t)), sigma)  # as exact as in a tensor of timesteps, since mps has no float64

    def point_at(self, t: float) -> Point:
        return self.point(t, self.table.sigma(t))

    def point_of(self, sigma: float, schedule: str = "") -> Point:
        return self.point(self.table.t(sigma), sigma, schedule)

    def place(self, steps: int) -> list[Point]:
        """Where ``steps`` steps start, by the config's spacing and sigma schedule."""
        train, name, by_sigma = self.config.num_train_timesteps, self.key("timestep_spacing"), self.sigma_schedule()
        unused = int((-np.log(self.table.sigmas) < self.key("lambda_min_clipped")).sum())
        even, offset = name if name in EVEN else "linspace", self.key("steps_offset")
        times = spacing.timesteps(even, steps, train, last=train - unused, offset=offset, spare=self.spare)
        if by_sigma is None:
            validation.timesteps(f"the timesteps of {steps} steps", times[:1].tolist(), self.table.last)
            points = [self.point_at(float(t)) for t in (times.round() if self.whole else times)]
            validation.falling(f"the noise levels of {steps} steps", [point.sigma for point in points])
            return points
        spaced = not self.variance_preserving and name in EVEN  # k-diffusion's span the steps, not the whole table
        low, high = (self.table.sigma(t) for t in ((times[-1], times[0]) if spaced else (0, train - 1)))
        ends = self.key("sigma_min") or low, self.key("sigma_max") or high
        return [self.point_of(float(s), by_sigma) for s in spacing.sigmas(by_sigma, steps, *ends, self.table)]

    def end(self) -> Point:
        """Where the last step goes: to no noise at all, or to the noise of timestep 0."""
        zero = self.key("final_sigmas_type") == "zero" and self.key("set_alpha_to_one")
        return Point(0.0, 0.0 if zero else self.table.sigma(0))

    def starts(self, plan: Schedule) -> list[int]:
        """The calls, by number, at which a step begins: a run can start there. Others are in the middle of a step."""
        last = {id(call): number for number, call in enumerate(plan.calls)}
        return [last[id(point)] for point in plan.points]

    def from_call(self, plan: Schedule, call: int) -> Schedule:
        """The rest of a plan, whose calls are the plan's own from ``call`` on."""
        if call not in (starts := self.starts(plan)):
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
        options = self.read_options(options, eta)
        end, most = self.end(), self.config.num_train_timesteps
        validation.exactly_one({"steps": steps, "timesteps": timesteps, "sigmas": sigmas})
        if steps is not None:
            points = self.place(validation.integer("the number of steps", steps, least=1, most=most))
        elif timesteps is not None:
            times = validation.numbers_list("timesteps", timesteps)
            if chosen := self.sigma_schedule():
                raise InputError(f"timesteps cannot be given where the config asks for the sigma schedule {chosen}")
            validation.falling("timesteps", times)
            validation.timesteps("timesteps", times, self.table.last, self.whole)
            points = [self.point_at(t) for t in times]
        else:
            levels = validation.numbers_list("sigmas", sigmas)
            validation.falling("sigmas", levels)
            if len(levels) < 2 or levels[-1] < 0:
                raise InputError(f"sigmas must be two or more, and end at 0 or above, not {levels}")
            *points, end = map(self.point_of, levels)
        solver, border = self.solver(len(points), **options), self.border(**options)
        initial = self.initial_sigma(points[0].sigma)
        return Schedule(tuple(points), end, solver, border, initial, self.needs_unconditional)

    def sigma_schedule(self) -> str | None:
        """The name of the sequence of noise levels, where the config asks for one."""
        for name in ("karras", "exponential", "beta"):
            if self.key(f"use_{name}_sigmas"):
                return name
        name = self.key("timestep_spacing")
        return "lu" if self.key("use_lu_lambdas") else None if name in EVEN else str(name)

    def initial_sigma(self, highest: float) -> float:
        """What standard normal noise is multiplied with to start from a noise level, as Diffusers does."""
        if self.variance_preserving:
            return 1.0
        return math.sqrt(highest**2 + 1) if self.key("timestep_spacing") == "leading" else highest

    def read_options(self, given: Mapping[str, Any], eta: float | None) -> dict[str, Any]:
        """The options of a run, defaults included. An eta of 0 asks nothing of a scheduler that has none."""
        options = {**self.options, **given}
        if eta is not None and (eta != 0 or "eta" in self.options):
            options["eta"] = validation.number("eta", eta, least=0, most=1)
        if unknown := options.keys() - self.options.keys():
            has = f"it has {', '.join(self.options) or 'no options'}"
            raise UnsupportedArgument(f"{type(self).__name__} does not take {', '.join(unknown)}; {has}")
        return options
