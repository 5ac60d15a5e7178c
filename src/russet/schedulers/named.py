"""The schedulers by their Diffusers class names: config keys, the convention for the latents, and a solver.

Keys and defaults are Diffusers'. The classes at the end are Russet's own, for samplers that Diffusers does not have.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np

from russet.errors import InputError
from russet.schedulers import multistep, noise_levels, solvers
from russet.schedulers.configs import CLIPPING, HIGH_ORDER, RANGE, SIGMAS, SPACED, THRESHOLDING, ZERO_SNR
from russet.schedulers.multistep import Exponential
from russet.schedulers.noise_levels import ALMOST_PURE_NOISE, CosineTable, NoiseTable, Point
from russet.schedulers.schedule import Parameterization, Schedule
from russet.schedulers.scheduler import Scheduler
from russet.schedulers.solvers import Solver

LIMITED = (*SPACED, *CLIPPING, *THRESHOLDING, *ZERO_SNR)
K_DIFFUSION = (*SPACED, *SIGMAS)
EULER = (*K_DIFFUSION, *RANGE, *ZERO_SNR, "interpolation_type", "timestep_type")
DPM = (*HIGH_ORDER, "algorithm_type", "final_sigmas_type", "lambda_min_clipped", "variance_type")
MULTISTEP = (*SPACED, *ZERO_SNR, *DPM, "euler_at_final", "use_lu_lambdas")
UNIPC = (*SPACED, *ZERO_SNR, *RANGE, *HIGH_ORDER, "predict_x0", "disable_corrector", "solver_p", "shift_terminal")
DISTILLED = (*LIMITED, "set_alpha_to_one", "original_inference_steps", "timestep_scaling")
CHURNED = (*EULER, "s_churn", "s_tmin", "s_tmax")
RESTARTED = (*K_DIFFUSION, *CLIPPING, "restart_times", "restart_sigma_min", "restart_sigma_max")
SD: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}  # Stable Diffusion's own
IPNDM = partial(multistep.multistep, rule=partial(multistep.adams, even=True), order=4)
SHORT = 15  # steps; in runs of fewer, the solvers of DPM-Solver's kind lower their order towards the end


class DDIMScheduler(Scheduler, keys=LIMITED, timestep_spacing="leading", clip_sample=True, set_alpha_to_one=True):
    """DDIM (arXiv:2010.02502): deterministic with ``eta`` 0, ancestral with 1."""

    zero_snr = ALMOST_PURE_NOISE
    options: ClassVar[Mapping[str, Any]] = {"eta": 0.0, "use_clipped_model_output": False}
    takes_variance_noise = True

    def solver(self, steps: int, **options: Any) -> Solver:
        return partial(solvers.euler, eta=options["eta"])


class DDPMScheduler(Scheduler, keys=LIMITED, timestep_spacing="leading", clip_sample=True, variance_type="fixed_small"):
    """DDPM (arXiv:2006.11239), with the posterior's variance or with beta ("fixed_large")."""

    zero_snr = ALMOST_PURE_NOISE

    def solver(self, steps: int, **options: Any) -> Solver:
        return partial(solvers.euler, eta=1.0, large=self.key("variance_type").startswith("fixed_large"))


class PNDMScheduler(Scheduler, keys=SPACED, timestep_spacing="leading", skip_prk_steps=False, set_alpha_to_one=False):
    """PNDM (arXiv:2202.09778); with ``skip_prk_steps`` it is PLMS, the sampler of the first Stable Diffusion."""

    def solver(self, steps: int, **options: Any) -> Solver:
        if self.key("skip_prk_steps"):
            return partial(multistep.pndm, start=multistep.heun_start, starts=1)
        start = partial(multistep.runge_kutta_start, middle=lambda a, b: self.point_at(b.t + (a.t - b.t) // 2))
        return partial(multistep.pndm, start=start, starts=3)

    def from_call(self, schedule: Schedule, call: int) -> Schedule:
        """From the middle no step is made twice: where a timestep comes twice, a step has the length 0."""
        return schedule if call == 0 else dataclasses.replace(schedule, points=schedule.calls[call:], solver=IPNDM)

    def starts(self, schedule: Schedule) -> list[int]:
        return list(range(len(schedule.calls)))


class VarianceExploding(Scheduler, variance_preserving=False, integer_timesteps=False):
    """The schedulers of k-diffusion: latents are x0 + sigma * eps, timesteps may be fractional."""


class EulerDiscreteScheduler(VarianceExploding, keys=EULER, solver=solvers.euler):
    """Euler's method (arXiv:2206.00364)."""


class EulerAncestralDiscreteScheduler(
    VarianceExploding, keys=(*SPACED, *ZERO_SNR), solver=partial(solvers.euler, eta=1.0)
):
    """Euler's method with ancestral noise: "Euler a"."""


class LMSDiscreteScheduler(VarianceExploding, keys=K_DIFFUSION):
    """Linear multistep of the orders 1 to 4 (``order``)."""

    options: ClassVar[Mapping[str, Any]] = {"order": 4}

    def solver(self, steps: int, **options: Any) -> Solver:
        if options["order"] not in (1, 2, 3, 4):
            raise InputError(f"order must be 1, 2, 3 or 4, not {options['order']!r}")
        return partial(multistep.multistep, rule=multistep.adams, order=options["order"])


class HeunDiscreteScheduler(VarianceExploding, keys=(*K_DIFFUSION, *CLIPPING), order=2, solver=solvers.heun, **SD):
    """Heun's method (arXiv:2206.00364, algorithm 1)."""


class KDPM2DiscreteScheduler(VarianceExploding, keys=K_DIFFUSION, order=2, **SD):
    """DPM-Solver-2 (arXiv:2206.00927) as k-diffusion has it: "DPM2"."""

    def solver(self, steps: int, **options: Any) -> Solver:
        return partial(solvers.dpm2, at=self.point_of)

    def point(self, t: float, sigma: float, schedule: str = "") -> Point:
        return super().point(round(t) if schedule == "karras" else t, sigma)


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """DPM-Solver-2 with ancestral noise: "DPM2 a"."""

    def solver(self, steps: int, **options: Any) -> Solver:
        return partial(solvers.dpm2, at=self.point_of, eta=1.0)


class DPMSolverSDEScheduler(VarianceExploding, keys=(*K_DIFFUSION, "noise_sampler_seed"), order=2, **SD):
    """DPM-Solver++ (SDE) with the noise of one Brownian path per image: "DPM++ SDE"."""

    noise_in_float32 = True

    def solver(self, steps: int, **options: Any) -> Solver:
        return partial(solvers.dpmpp_sde, at=self.point_of, seed=self.key("noise_sampler_seed"))


class DPMSolverMultistepScheduler(Scheduler, keys=MULTISTEP, extra_steps=1, takes_variance_noise=True):
    """DPM-Solver and DPM-Solver++ that remember, 1M to 3M, and their SDE forms (arXiv:2206.00927, 2211.01095)."""

    noise_in_float32 = True

    def solver(self, steps: int, **options: Any) -> Solver:
        order, lowered = self.key("solver_order"), self.key("lower_order_final") and steps < SHORT
        tail = order if lowered else int(self.key("euler_at_final"))
        return partial(multistep.multistep, rule=self.method(), order=order, tail=tail)

    def method(self) -> Exponential:
        name = self.key("algorithm_type")
        return Exponential(self.key("solver_type"), data=name.endswith("++"), sde=name.startswith("sde"))


class DPMSolverSinglestepScheduler(
    DPMSolverMultistepScheduler, keys=DPM, lower_order_final=False, takes_variance_noise=False
):
    """DPM-Solver and DPM-Solver++ in groups of steps that remember nothing of each other: "DPM++ 2S"."""

    noise_in_float32 = False

    def solver(self, steps: int, **options: Any) -> Solver:
        order, zero = self.key("solver_order"), self.key("final_sigmas_type") == "zero"
        orders = [1 + step % order for step in range(steps)]
        if zero or (self.key("lower_order_final") and orders[-1] == order):
            orders[-1] = 1
        return partial(multistep.singlestep, method=self.method(), orders=orders)


class DEISMultistepScheduler(
    DPMSolverMultistepScheduler,
    keys=(*SPACED, *HIGH_ORDER),
    algorithm_type="deis",
    solver_type="logrho",
    takes_variance_noise=False,
):
    """DEIS (arXiv:2204.13902), its log-rho form."""

    def end(self) -> Point:
        return Point(0.0, self.table.sigma(0))


class UniPCMultistepScheduler(Scheduler, keys=UNIPC, solver_type="bh2", extra_steps=1):
    """UniPC (arXiv:2302.04867) of the orders 1 to 3, a predictor with a corrector."""

    def solver(self, steps: int, **options: Any) -> Solver:
        order, rule = self.key("solver_order"), Exponential(self.key("solver_type"), data=self.key("predict_x0"))
        tail = order if self.key("lower_order_final") else 0
        corrected = set(range(1, steps + 1)) - {steps - number for number in self.key("disable_corrector")}
        return partial(multistep.multistep, rule=rule, order=order, tail=tail, corrected=corrected)


class IPNDMScheduler(Scheduler, keys=("trained_betas",), integer_timesteps=False, solver=IPNDM):
    """The improved PNDM of arXiv:2204.13902 on noise levels of its own, for models that predict v at t in 0..1."""

    def make_table(self) -> NoiseTable:
        return CosineTable()

    def parameterization(self, **options: Any) -> Parameterization:
        return Parameterization(self.variance_preserving, "v_prediction")

    def points_for(self, steps: int) -> list[Point]:
        shares = np.sin(np.linspace(1, 0, steps + 1)[:-1] * math.pi / 2) ** 2
        return [self.point_at(math.asin(share) * 2 / math.pi) for share in shares]


class LCMScheduler(Scheduler, keys=DISTILLED, beta_schedule="scaled_linear", timestep_spacing="leading", **SD):
    """Latent consistency models (arXiv:2310.04378). The steps are those of the distillation, whatever the spacing."""

    zero_snr = ALMOST_PURE_NOISE

    def solver(self, steps: int, **options: Any) -> Solver:
        return partial(solvers.lcm, scaling=self.key("timestep_scaling"))

    def points_for(self, steps: int) -> list[Point]:
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
        return partial(solvers.tcd, lower=lambda b: self.point_at(math.floor((1 - options["eta"]) * b.t)))

    def parameterization(self, **options: Any) -> Parameterization:
        return dataclasses.replace(super().parameterization(), limit=None)

    def end(self) -> Point:
        return Point(0.0, self.table.sigma(0))


# -- Russet's own


class EulerChurnScheduler(EulerDiscreteScheduler, keys=CHURNED, solver=partial(solvers.heun, second=False)):
    """Euler's method that adds a little noise before each step but the first (arXiv:2206.00364, algorithm 2).

    differs from Diffusers, whose ``step(s_churn=…)`` adds the noise after the model was called.
    """

    def points_for(self, steps: int) -> list[Point]:
        first, *rest = super().points_for(steps)
        low, high = self.key("s_tmin"), self.key("s_tmax") or math.inf
        by = 1 + min(self.key("s_churn") / steps, math.sqrt(2) - 1)
        raised = [dataclasses.replace(self.point_of(p.sigma * by), arrival=p) for p in rest]
        return [first, *(up if low <= p.sigma <= high else p for p, up in zip(rest, raised, strict=True))]


class DPMSolverSinglestepAncestralScheduler(VarianceExploding, keys=K_DIFFUSION, order=2, **SD):
    """DPM-Solver++(2S) with ancestral noise: k-diffusion's "DPM++ 2S a"."""

    def solver(self, steps: int, **options: Any) -> Solver:
        return partial(solvers.dpm2, at=self.point_of, data=True, eta=1.0)


class IPNDMDiscreteScheduler(VarianceExploding, keys=K_DIFFUSION, solver=IPNDM):
    """The improved PNDM on the noise that the model was trained with."""


class RestartScheduler(HeunDiscreteScheduler, keys=RESTARTED, use_karras_sigmas=True, **SD):
    """Restart sampling (arXiv:2306.14878): Heun's method that, near the end, adds noise and goes down once more.

    Of 20 steps or more, a quarter goes to each of ``restart_times`` ways from ``restart_sigma_max`` down again.
    """

    def points_for(self, steps: int) -> list[Point]:
        each, times = steps // 4, self.key("restart_times")
        down = super().points_for(steps - each * times if each >= 5 else steps)
        low = min(range(len(down)), key=lambda i: abs(down[i].sigma - self.key("restart_sigma_min")))
        again = noise_levels.karras(each + 1, down[low].sigma, self.key("restart_sigma_max"))[:-1]
        if each < 5 or low == 0 or again[0] <= down[low].sigma:
            return down
        first, *rest = map(self.point_of, again.tolist())
        loop = [dataclasses.replace(first, arrival=down[low]), *rest]
        return [*down[:low], *(dataclasses.replace(point) for _ in range(times) for point in loop), *down[low:]]


class EulerCFGPPScheduler(EulerDiscreteScheduler, needs_unconditional=True):
    """Euler's method by CFG++ (arXiv:2406.08070): the guided image with the unguided noise; guidance 0..1."""


class EulerAncestralCFGPPScheduler(EulerAncestralDiscreteScheduler, needs_unconditional=True):
    """Euler a by CFG++ (arXiv:2406.08070)."""


class DDIMCFGPPScheduler(DDIMScheduler, needs_unconditional=True):
    """DDIM by CFG++ (arXiv:2406.08070, algorithm 2)."""
