"""The schedulers by their Diffusers class names: a config, a convention for the latents, and a solver.

Keys and defaults are Diffusers'. The classes at the end are Russet's own, for samplers that Diffusers does not have.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from russet.errors import InputError
from russet.schedulers import multistep, solvers, spacing
from russet.schedulers.configs import (
    DEIS,
    Churn,
    Clipping,
    Distilled,
    DPMSolver,
    Restart,
    SchedulerConfig,
    SigmaChoice,
    SigmaRange,
    Spaced,
    Thresholding,
    UniPC,
    ZeroSNR,
    keys,
)
from russet.schedulers.exponential import Exponential
from russet.schedulers.noise import ALMOST_PURE_NOISE, CosineTable, Point, Table
from russet.schedulers.schedule import Border, Schedule
from russet.schedulers.scheduler import Scheduler
from russet.schedulers.solvers import Solver

Limited = keys(Spaced, Clipping, Thresholding, ZeroSNR, timestep_spacing="leading")
KDiffusion = keys(Spaced, SigmaChoice, beta_start=0.00085, beta_end=0.012)
SHORT = 15  # steps; in runs of fewer, the solvers of DPM-Solver's kind lower their order towards the end


class DDIMScheduler(Scheduler):
    """DDIM (arXiv:2010.02502): deterministic with ``eta`` 0, ancestral with 1."""

    config_class = keys(Limited, set_alpha_to_one=True)
    zero_snr = ALMOST_PURE_NOISE
    options: ClassVar[Mapping[str, Any]] = {"eta": 0.0, "use_clipped_model_output": False}
    takes_variance_noise = True

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(solvers.euler, eta=options["eta"])

    def border(self, **options: Any) -> Border:
        return dataclasses.replace(super().border(), keeps_noise=not options["use_clipped_model_output"])


class DDPMScheduler(Scheduler):
    """DDPM (arXiv:2006.11239), with the posterior's variance or with beta ("fixed_large")."""

    config_class = keys(Limited, variance_type="fixed_small")
    zero_snr = ALMOST_PURE_NOISE

    def solver(self, steps: int, **options: Any) -> Solver:
        large = self.key("variance_type").startswith("fixed_large")
        return solvers.ddpm_large if large else functools.partial(solvers.euler, eta=1.0)


class PNDMScheduler(Scheduler):
    """PNDM (arXiv:2202.09778); with ``skip_prk_steps`` it is PLMS, the sampler of the first Stable Diffusion."""

    config_class = keys(Spaced, timestep_spacing="leading", skip_prk_steps=False, set_alpha_to_one=False)

    def solver(self, steps: int, **options: Any) -> Solver:
        if self.key("skip_prk_steps"):
            return multistep.plms
        return functools.partial(multistep.prk, middle=lambda a, b: self.point_at(b.t + (a.t - b.t) // 2))

    def from_call(self, plan: Schedule, call: int) -> Schedule:
        """From the middle no step is made twice: where the timesteps name one twice, a step has the length 0."""
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
    """Euler's method (arXiv:2206.00364)."""

    config_class = keys(Spaced, SigmaChoice, SigmaRange, ZeroSNR, interpolation_type="linear", timestep_type="discrete")

    def solver(self, steps: int, **options: Any) -> Solver:
        return solvers.euler


class EulerAncestralDiscreteScheduler(VarianceExploding):
    """Euler's method with ancestral noise: "Euler a"."""

    config_class = keys(Spaced, ZeroSNR)

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(solvers.euler, eta=1.0)


class LMSDiscreteScheduler(VarianceExploding):
    """Linear multistep of the orders 1 to 4 (``order``)."""

    config_class = keys(Spaced, SigmaChoice)
    options: ClassVar[Mapping[str, Any]] = {"order": 4}

    def solver(self, steps: int, **options: Any) -> Solver:
        if options["order"] not in (1, 2, 3, 4):
            raise InputError(f"order must be 1, 2, 3 or 4, not {options['order']!r}")
        return functools.partial(multistep.lms, order=options["order"])


class HeunDiscreteScheduler(VarianceExploding):
    """Heun's method (arXiv:2206.00364, algorithm 1)."""

    config_class = keys(KDiffusion, Clipping, clip_sample=False)
    order = 2

    def solver(self, steps: int, **options: Any) -> Solver:
        return solvers.one_step


class KDPM2DiscreteScheduler(VarianceExploding):
    """DPM-Solver-2 (arXiv:2206.00927) as k-diffusion has it: "DPM2"."""

    config_class = keys(KDiffusion)
    order = 2

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(solvers.dpm2, at=self.point_of)

    def point(self, t: float, sigma: float, schedule: str = "") -> Point:
        return Point(float(round(t)) if schedule == "karras" else t, sigma)


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """DPM-Solver-2 with ancestral noise: "DPM2 a"."""

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(solvers.dpm2, at=self.point_of, eta=1.0)


class DPMSolverSDEScheduler(VarianceExploding):
    """DPM-Solver++ (SDE) with noise from a Brownian path: "DPM++ SDE". One path per image; see ``brownian.py``."""

    config_class = keys(KDiffusion, noise_sampler_seed=(int | tuple[int, ...] | None, None))
    order = 2

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(solvers.dpmpp_sde, at=self.point_of, seed=self.key("noise_sampler_seed"))


class DPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver and DPM-Solver++ that remember, 1M to 3M, and their SDE forms (arXiv:2206.00927, 2211.01095)."""

    config_class = keys(Spaced, ZeroSNR, DPMSolver, euler_at_final=False, use_lu_lambdas=False)
    spare = 1
    takes_variance_noise = True

    def solver(self, steps: int, **options: Any) -> Solver:
        tail = max(self.tail(steps), int(self.key("euler_at_final")))
        order = self.key("solver_order")
        return functools.partial(multistep.dpm_multistep, method=self.method(), order=order, tail=tail)

    def method(self) -> Exponential:
        name = self.key("algorithm_type")
        exact = self.key("solver_type") == "heun"
        return Exponential(data=name.endswith("++"), sde=name.startswith("sde"), exact=exact)

    def tail(self, steps: int) -> int:
        """How many of the last steps are made with no higher an order than there are steps left."""
        return int(self.key("solver_order")) if self.key("lower_order_final") and steps < SHORT else 0


class DPMSolverSinglestepScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver and DPM-Solver++ in groups of steps that remember nothing of each other: "DPM++ 2S"."""

    config_class = keys(DPMSolver, lower_order_final=False)
    takes_variance_noise = False

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(multistep.dpm_singlestep, method=self.method(), orders=self.orders(steps))

    def orders(self, steps: int) -> list[int]:
        """Groups 1, 2, … order; with ``lower_order_final``, or where the steps do not fit, the last one is shorter."""
        order: int = self.key("solver_order")
        zero = self.key("final_sigmas_type") == "zero"
        group = [*range(1, order + 1)]
        if steps % order == 0 and not self.key("lower_order_final") and not zero:
            return group * (steps // order)
        rest = steps % order or order
        last = [*group[:-1], 1] if rest == order else group[:rest]
        return [*group * ((steps - rest) // order), *last[:-1], 1 if zero else last[-1]]


class DEISMultistepScheduler(DPMSolverMultistepScheduler):
    """DEIS (arXiv:2204.13902), its log-rho form."""

    config_class = keys(Spaced, DEIS)
    takes_variance_noise = False

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(multistep.deis, order=self.key("solver_order"), tail=self.tail(steps))

    def end(self) -> Point:
        return Point(0.0, self.table.sigma(0))


class UniPCMultistepScheduler(Scheduler):
    """UniPC (arXiv:2302.04867) of the orders 1 to 3, a predictor with a corrector."""

    config_class = keys(Spaced, ZeroSNR, SigmaRange, UniPC)
    spare = 1

    def solver(self, steps: int, **options: Any) -> Solver:
        order = self.key("solver_order")
        return functools.partial(
            multistep.unipc,
            method=Exponential(data=self.key("predict_x0"), bh1=self.key("solver_type") == "bh1"),
            order=order,
            tail=order if self.key("lower_order_final") else 0,
            uncorrected={steps - number for number in self.key("disable_corrector")},
        )


class IPNDMScheduler(Scheduler):
    """The improved PNDM of arXiv:2204.13902 on noise levels of its own, for models that predict v at t in 0..1."""

    config_class = keys(SchedulerConfig, trained_betas=None)
    whole = False

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(multistep.plms, warm_up=False)

    def make_table(self) -> Table:
        return CosineTable()

    def place(self, steps: int) -> list[Point]:
        shares = np.sin(np.linspace(1, 0, steps + 1)[:-1] * math.pi / 2) ** 2
        return [self.point_at(math.asin(share) * 2 / math.pi) for share in shares]

    def last_timestep(self) -> float:
        return 1.0


class LCMScheduler(Scheduler):
    """Latent consistency models (arXiv:2310.04378). The steps are those of the distillation, whatever the spacing."""

    config_class = keys(Distilled, Limited, clip_sample=False, set_alpha_to_one=True)
    zero_snr = ALMOST_PURE_NOISE

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(solvers.lcm, scaling=self.key("timestep_scaling"))

    def place(self, steps: int) -> list[Point]:
        trained = self.key("original_inference_steps")
        if steps > trained:
            raise InputError(f"the model was distilled for {trained} steps (original_inference_steps), not {steps}")
        apart = self.config.num_train_timesteps // trained
        skipped = np.floor(np.linspace(0, trained, steps, endpoint=False))
        return [self.point_at(float((trained - skip) * apart - 1)) for skip in skipped]

    def end(self) -> Point:
        return Point(0.0, 0.0)


class TCDScheduler(LCMScheduler):
    """Trajectory consistency distillation (arXiv:2402.19159); ``eta`` is the paper's gamma."""

    options: ClassVar[Mapping[str, Any]] = {"eta": 0.3}

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(solvers.tcd, lower=lambda b: self.point_at(math.floor((1 - options["eta"]) * b.t)))

    def border(self, **options: Any) -> Border:
        return Border(self.variance_preserving, self.key("prediction_type"))

    def end(self) -> Point:
        return Point(0.0, self.table.sigma(0))


# -- Russet's own


class EulerChurnScheduler(EulerDiscreteScheduler):
    """Euler's method that adds a little noise before each step but the first (arXiv:2206.00364, algorithm 2).

    differs from Diffusers, whose ``step(s_churn=…)`` adds the noise after the model was called.
    """

    config_class = keys(EulerDiscreteScheduler.config_class, Churn)

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(solvers.one_step, step=solvers.euler_step)

    def place(self, steps: int) -> list[Point]:
        first, *rest = super().place(steps)
        low, high = self.key("s_tmin"), self.key("s_tmax") or math.inf
        by = 1 + min(self.key("s_churn") / steps, math.sqrt(2) - 1)
        raised = [dataclasses.replace(self.point_of(p.sigma * by), arrival=p) for p in rest]
        return [first, *(up if low <= p.sigma <= high else p for p, up in zip(rest, raised, strict=True))]


class DPMSolverSinglestepAncestralScheduler(VarianceExploding):
    """DPM-Solver++(2S) with ancestral noise: k-diffusion's "DPM++ 2S a"."""

    config_class = keys(KDiffusion)
    order = 2

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(solvers.dpmpp_2s_ancestral, at=self.point_of)


class IPNDMDiscreteScheduler(LMSDiscreteScheduler):
    """The improved PNDM on the noise that the model was trained with."""

    options: ClassVar[Mapping[str, Any]] = {}

    def solver(self, steps: int, **options: Any) -> Solver:
        return functools.partial(multistep.plms, warm_up=False)


class RestartScheduler(HeunDiscreteScheduler):
    """Restart sampling (arXiv:2306.14878): Heun's method that, near the end, adds noise and goes down once more.

    Of 20 steps or more, a quarter goes to each of ``restart_times`` ways from ``restart_sigma_max`` down again.
    """

    config_class = keys(HeunDiscreteScheduler.config_class, Restart, use_karras_sigmas=True)

    def place(self, steps: int) -> list[Point]:
        each, times = steps // 4, self.key("restart_times")
        down = super().place(steps - each * times if each >= 5 else steps)
        low = min(range(len(down)), key=lambda i: abs(down[i].sigma - self.key("restart_sigma_min")))
        again = spacing.karras(each + 1, down[low].sigma, self.key("restart_sigma_max"))[:-1]
        if each < 5 or low == 0 or again[0] <= down[low].sigma:
            return down
        first, *rest = map(self.point_of, again.tolist())
        loop = [dataclasses.replace(first, arrival=down[low]), *rest]
        return [*down[:low], *(dataclasses.replace(point) for _ in range(times) for point in loop), *down[low:]]


class EulerCFGPPScheduler(EulerDiscreteScheduler):
    """Euler's method by CFG++ (arXiv:2406.08070): the guided image with the unguided noise; guidance 0..1."""

    needs_unconditional = True


class EulerAncestralCFGPPScheduler(EulerAncestralDiscreteScheduler):
    """Euler a by CFG++ (arXiv:2406.08070)."""

    needs_unconditional = True


class DDIMCFGPPScheduler(DDIMScheduler):
    """DDIM by CFG++ (arXiv:2406.08070, algorithm 2)."""

    needs_unconditional = True
