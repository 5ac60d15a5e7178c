"""Fed the true noise, each deterministic solver lands on the image: from every start, in any number of steps.

The model's every answer is then the same line through the image, which a solver of any order follows exactly. What is
left is float32 rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from russet.schedulers import configs, named
from russet.schedulers.noise_levels import Point
from russet.schedulers.schedule import Schedule
from russet.schedulers.scheduler import Scheduler

CLOSE = 1e-4
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DPM = ("dpmsolver++", "dpmsolver")

DETERMINISTIC: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIM", {"clip_sample": False}),
    "ddim ending at sigma_min": ("DDIM", {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": ("PNDM", {}),
    "plms": ("PNDM", {"skip_prk_steps": True}),
    "euler": ("EulerDiscrete", {}),
    "heun": ("HeunDiscrete", {}),
    "lms": ("LMSDiscrete", {}),
    "dpm2": ("KDPM2Discrete", {}),
    "deis 3": ("DEISMultistep", {"solver_order": 3}),
    "deis 2": ("DEISMultistep", {}),
    "ipndm": ("IPNDMDiscrete", {}),
    "tcd": ("TCD", {}),
    "unipc eps": ("UniPCMultistep", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    **{
        f"unipc {k} {b}": ("UniPCMultistep", {"solver_order": k, "solver_type": b})
        for k in (1, 2, 3)
        for b in ("bh1", "bh2")
    },
    **{f"{f} {k}M": ("DPMSolverMultistep", {"solver_order": k, "algorithm_type": f}) for k in (1, 2, 3) for f in DPM},
    **{f"{f} {k}S": ("DPMSolverSinglestep", {"solver_order": k, "algorithm_type": f}) for k in (1, 2, 3) for f in DPM},
    "3M heun ending at sigma_min": (
        "DPMSolverMultistep",
        {"solver_order": 3, "solver_type": "heun", "final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
    ),
}


def make(name: str, **changes: Any) -> Scheduler:
    scheduler, config = DETERMINISTIC[name]
    scheduler_class: type[Scheduler] = getattr(named, scheduler + "Scheduler")
    return scheduler_class(**{**SD, **config, **changes})


def latents() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, 4, 4, generator=generator), torch.randn(1, 4, 4, 4, generator=generator)


def answer(prediction_type: str, x0: Tensor, eps: Tensor, point: Point) -> Tensor:
    """What a perfect model says at a point, if the noise is ``eps``."""
    alpha = (1 + point.sigma**2) ** -0.5
    return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - point.sigma * alpha * x0}[prediction_type]


def error(schedule: Schedule, prediction_type: str) -> float:
    """How far from the image a run ends, relative to the image."""
    x0, eps = latents()
    run = schedule.run(schedule.add_noise(x0, eps), lambda: torch.full_like(x0, float("nan")))
    while run.point is not None:
        run.send(answer(prediction_type, x0, eps, run.point))
    wanted = schedule.parameterization.to_public(x0 + schedule.end.sigma * eps, schedule.end.sigma)
    return float((run.latents - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50])
def test_a_solver_fed_the_true_noise_lands_on_the_image_from_every_start(name: str, steps: int) -> None:
    schedule = make(name).schedule(steps)
    assert max(error(schedule.start_at(start), "epsilon") for start in range(steps)) < CLOSE


@pytest.mark.parametrize("spacing", [*configs.EVEN, *configs.BY_SIGMA])
@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if not name.endswith(("S", "sigma_min"))])
def test_it_does_so_with_every_spacing(name: str, spacing: str) -> None:
    for steps in (1, 2, 5, 20):
        schedule = make(name, timestep_spacing=spacing).schedule(steps)
        assert max(error(schedule.start_at(start), "epsilon") for start in {0, steps // 2}) < CLOSE


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_it_does_so_with_every_prediction_type(name: str, prediction_type: str) -> None:
    for steps in (1, 2, 7, 20):
        schedule = make(name, prediction_type=prediction_type).schedule(steps)
        assert max(error(schedule.start_at(start), prediction_type) for start in {0, steps // 2}) < CLOSE


def test_ipndm_on_its_own_noise_levels_does_so_too() -> None:
    for steps in (1, 2, 5, 20, 50):
        schedule = named.IPNDMScheduler().schedule(steps)
        assert max(error(schedule.start_at(start), "v_prediction") for start in range(0, steps, 7)) < CLOSE


def test_zero_terminal_snr_does_so_too() -> None:
    for name in ("ddim", "euler", "dpmsolver++ 2M", "unipc 2 bh2"):
        scheduler = make(name, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
        assert error(scheduler.schedule(10), "v_prediction") < CLOSE


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_step_protocol_does_so_from_every_call_at_which_it_can_begin(name: str) -> None:
    scheduler = make(name)
    x0, eps = latents()
    scheduler.set_timesteps(8)
    plan = scheduler.schedule(8)
    wanted = plan.parameterization.to_public(x0 + plan.end.sigma * eps, plan.end.sigma)
    for begin in scheduler.starts(plan):
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(begin)
        x = scheduler.add_noise(x0, eps, scheduler.timesteps[begin : begin + 1])
        options = {"eta": 0.0} if name == "tcd" else {}
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(eps, t, x, **options).prev_sample
        assert (x - wanted).norm() < CLOSE * wanted.norm()
