"""Stochastic solvers on a Gaussian: the samples' mean and deviation are right, and each image has its own noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from russet.rng import draw
from russet.schedulers import named
from russet.schedulers.scheduler import Scheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "sample"}
MEAN, DEVIATION = 0.7, 0.5
PIXELS = 160
KARRAS = {"use_karras_sigmas": True}

# name: config, options, steps (a first-order SDE solver needs many)
STOCHASTIC: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "ddim eta 1": ("DDIM", {"clip_sample": False}, {"eta": 1.0}, 400),
    "ddim eta 0.5": ("DDIM", {"clip_sample": False}, {"eta": 0.5}, 400),
    "ddpm": ("DDPM", {"clip_sample": False}, {}, 500),
    "ddpm large": ("DDPM", {"clip_sample": False, "variance_type": "fixed_large"}, {}, 1000),
    "euler a": ("EulerAncestralDiscrete", {"timestep_spacing": "karras"}, {}, 400),
    "euler churn": ("EulerChurn", {"use_karras_sigmas": True, "s_churn": 20.0}, {}, 200),
    "dpm2 a": ("KDPM2AncestralDiscrete", KARRAS, {}, 60),
    "dpm++ 2s a": ("DPMSolverSinglestepAncestral", KARRAS, {}, 60),
    "dpm++ sde": ("DPMSolverSDE", KARRAS, {}, 60),
    "dpm++ 2m sde": ("DPMSolverMultistep", {**KARRAS, "algorithm_type": "sde-dpmsolver++"}, {}, 60),
    "dpm++ 3m sde": ("DPMSolverMultistep", {**KARRAS, "algorithm_type": "sde-dpmsolver++", "solver_order": 3}, {}, 60),
    "dpm 2m sde": ("DPMSolverMultistep", {**KARRAS, "algorithm_type": "sde-dpmsolver"}, {}, 200),
    "dpm++ 2s sde": ("DPMSolverSinglestep", {**KARRAS, "algorithm_type": "sde-dpmsolver++"}, {}, 200),
    "dpm++ 3s sde": (
        "DPMSolverSinglestep",
        {**KARRAS, "algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun"},
        {},
        600,
    ),
    "restart": ("Restart", {}, {}, 40),
}


def make(name: str) -> tuple[Scheduler, dict[str, Any], int]:
    scheduler, config, options, steps = STOCHASTIC[name]
    return getattr(named, scheduler + "Scheduler")(**SD, **config), options, steps


def denoised(x: Tensor, sigma: float) -> Tensor:
    """The mean of N(MEAN, DEVIATION²) given x = x0 + sigma * eps."""
    return (sigma**2 * MEAN + DEVIATION**2 * x) / (sigma**2 + DEVIATION**2)


def sampled(name: str, generators: list[Generator], *shape: int) -> Tensor:
    scheduler, options, steps = make(name)
    schedule = scheduler.schedule(steps, **options)
    sigma = schedule.points[0].sigma
    x = MEAN + math.sqrt(DEVIATION**2 + sigma**2) * draw(shape, generators, torch.device("cpu"))
    run = schedule.run(
        schedule.parameterization.to_public(x, sigma), lambda: draw(shape, generators, torch.device("cpu"))
    )
    while run.point is not None:
        run.send(denoised(schedule.parameterization.from_public(run.latents, run.sigma), run.sigma))
    return run.latents


@pytest.mark.parametrize("name", STOCHASTIC)
def test_samples_of_a_gaussian_have_its_mean_and_deviation(name: str) -> None:
    x = sampled(name, [Generator().manual_seed(1)], 1, 1, PIXELS, PIXELS)
    error = DEVIATION / PIXELS  # standard error of the mean of PIXELS² samples
    assert abs(float(x.mean()) - MEAN) < 4 * error
    # three standard errors of the deviation, and 3 % for steps that are not infinitely small
    assert float(x.std()) == pytest.approx(DEVIATION, rel=3 / (PIXELS * math.sqrt(2)) + 0.03)


@pytest.mark.parametrize("name", [name for name in STOCHASTIC if name not in ("ddim eta 1", "ddpm large")])
def test_an_images_noise_does_not_depend_on_its_batch(name: str) -> None:
    seeds = (5, 6, 7)
    together = sampled(name, [Generator().manual_seed(seed) for seed in seeds], 3, 1, 4, 4)
    for image, seed in zip(together, seeds, strict=True):
        # alone in the batch, the shape of a draw is the same, and so are its numbers
        assert torch.equal(sampled(name, [Generator().manual_seed(seed)], 1, 1, 4, 4)[0], image)
