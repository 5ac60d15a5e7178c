"""The schedulers by their Diffusers class names: a config, a convention for the latents, and a solver."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from russet.schedulers import configs, multistep, solvers
from russet.schedulers.exponential import Exponential
from russet.schedulers.noise import ALMOST_PURE_NOISE, Point
from russet.schedulers.schedule import Border, Schedule
from russet.schedulers.scheduler import Scheduler
from russet.schedulers.solvers import Solver

SHORT = 15  # steps; in runs below this, DPM-Solver's kind lowers its order towards the end


class DDIMScheduler(Scheduler):
    """DDIM (arXiv:2010.02502): deterministic with ``eta`` 0, ancestral with 1."""

    config_class = configs.DDIMConfig
    config: configs.DDIMConfig
    zero_snr = ALMOST_PURE_NOISE
    options: ClassVar[Mapping[str, Any]] = {"eta": 0.0, "use_clipped_model_output": False}
    takes_variance_noise = True

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(solvers.euler, eta=options["eta"])

    def border(self, **options: Any) -> Border:
        return dataclasses.replace(super().border(), keeps_noise=not options["use_clipped_model_output"])


class PNDMScheduler(Scheduler):
    """PNDM (arXiv:2202.09778); with ``skip_prk_steps`` it is known as PLMS, the sampler of the first Stable Diffusion."""

    config_class = configs.PNDMConfig
    config: configs.PNDMConfig

    def solver(self, steps: int, **options: Any) -> Solver:
        if self.config.skip_prk_steps:
            return multistep.plms
        return functools.partial(multistep.prk, middle=self.middle)

    def middle(self, a: Point, b: Point) -> Point:
        return self.point_at(b.t + (a.t - b.t) // 2)

    def from_call(self, plan: Schedule, call: int) -> Schedule:
        """From the middle, no step is made twice: what Diffusers' timesteps ask for twice is a step of length 0."""
        if call == 0:
            return plan
        rest = functools.partial(multistep.plms, warm_up=False)
        return dataclasses.replace(plan, points=plan.calls[call:], solver=rest)

    def starts(self, plan: Schedule) -> list[int]:
        return list(range(len(plan.calls)))


class VarianceExploding(Scheduler):
    """The schedulers of k-diffusion: latents are x0 + sigma * eps, timesteps may be fractional."""

    variance_preserving = False
    whole = False
    whole_range = False


class EulerDiscreteScheduler(VarianceExploding):
    """Euler's method (arXiv:2206.00364, without churn)."""

    config_class = configs.EulerConfig
    config: configs.EulerConfig

    def solver(self, steps: int, **options: Any) -> Solver:
        return solvers.euler


class EulerAncestralDiscreteScheduler(VarianceExploding):
    """Euler's method with ancestral noise, known as "Euler a"."""

    config_class = configs.EulerAncestralConfig
    config: configs.EulerAncestralConfig

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(solvers.euler, eta=1.0)


class DPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver and DPM-Solver++ that remember, 1M to 3M, and their SDE forms (arXiv:2206.00927, 2211.01095)."""

    config_class = configs.MultistepConfig
    config: configs.MultistepConfig
    spare = 1
    takes_variance_noise = True

    def solver(self, steps: int, **options: Any) -> Solver:
        config = self.config
        tail = config.solver_order if config.lower_order_final and steps < SHORT else int(config.euler_at_final)
        method = Exponential(
            data=config.algorithm_type.endswith("++"),
            sde=config.algorithm_type.startswith("sde"),
            exact=config.solver_type == "heun",
        )
        return functools.partial(multistep.dpm_multistep, method=method, order=config.solver_order, tail=tail)


def compatible_with(cls: type[Scheduler]) -> list[type[Scheduler]]:
    return [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler]
