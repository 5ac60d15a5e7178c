"""Whole loops against Diffusers: the same timesteps, noise levels and latents, with the same generator."""

from __future__ import annotations

import functools
import itertools
import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from russet.rng import Noise
from russet.schedulers import named
from russet.schedulers.noise_levels import Point
from russet.schedulers.schedule import unit_variance

from .loops import SD, normal, protocol, relative, wavy

diffusers = pytest.importorskip("diffusers")
# Float32 rounding differs, and is carried through up to 50 steps of a model that amplifies it.
CLOSE = 1e-4
SIGMAS = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
SPACINGS = [{"timestep_spacing": name, "steps_offset": 1} for name in ("linspace", "leading", "trailing")]
PREDICTIONS = [{"prediction_type": name} for name in ("epsilon", "v_prediction", "sample")]


def cases() -> list[Any]:
    every: list[tuple[str, dict[str, Any]]] = []

    def add(name: str, *configs: dict[str, Any], **step: Any) -> None:
        every.extend((name, {"config": config, **step}) for config in configs)

    plain = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    add("DDIM", {}, plain, {"thresholding": True, "sample_max_value": 1.5}, *PREDICTIONS)
    add("DDIM", {}, plain, draws=True, eta=0.7)
    add("DDIM", {}, use_clipped_model_output=True)
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    add("DDIM", zero_snr, {**zero_snr, "clip_sample": False})
    add("DDPM", {}, {"clip_sample": False}, *SPACINGS, *PREDICTIONS, draws=True)
    add("DDPM", {"variance_type": "fixed_large"}, {"variance_type": "fixed_small_log"}, draws=True)
    add("PNDM", {"skip_prk_steps": True}, {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": True})
    add("EulerDiscrete", *SPACINGS, *SIGMAS, *PREDICTIONS, {"final_sigmas_type": "sigma_min"}, zero_snr)
    add("EulerDiscrete", {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0})
    add("EulerAncestralDiscrete", *SPACINGS, *PREDICTIONS[:2], zero_snr, draws=True)
    add("LMSDiscrete", *SPACINGS[1:], *SIGMAS, *PREDICTIONS[1:])
    add("LMSDiscrete", {}, order=2)
    add("HeunDiscrete", *SPACINGS[1:], *SIGMAS, *PREDICTIONS[1:], {"clip_sample": True})
    add("KDPM2Discrete", SPACINGS[1], SIGMAS[1], PREDICTIONS[1])  # few: Diffusers' constructor takes a second
    add("KDPM2AncestralDiscrete", SPACINGS[2], SIGMAS[2], draws=True)
    add("DPMSolverMultistep", *SPACINGS, *SIGMAS, *PREDICTIONS, zero_snr, {"solver_order": 1}, {"thresholding": True})
    third = {"solver_order": 3}
    add("DPMSolverMultistep", third, {**third, "final_sigmas_type": "sigma_min"}, {**third, "use_karras_sigmas": True})
    add("DPMSolverMultistep", {"use_lu_lambdas": True}, {"euler_at_final": True, "final_sigmas_type": "sigma_min"})
    add("DPMSolverMultistep", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1})
    add("DPMSolverSinglestep", *SIGMAS, *PREDICTIONS, {"solver_order": 3}, {"solver_order": 3, "solver_type": "heun"})
    for kind in ("midpoint", "heun"):
        for family in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"):
            config = {"algorithm_type": family, "solver_type": kind, "final_sigmas_type": "sigma_min"}
            add("DPMSolverMultistep", config, draws="sde" in family)
            if family != "sde-dpmsolver":
                add("DPMSolverSinglestep", config, draws="sde" in family)
    add("DEISMultistep", *SPACINGS, *SIGMAS[:3], *PREDICTIONS, {"solver_order": 1}, {"solver_order": 3})
    add("UniPCMultistep", *SPACINGS, *SIGMAS, *PREDICTIONS, {"solver_order": 1}, {"solver_order": 3}, zero_snr)
    add("UniPCMultistep", {"predict_x0": False, "final_sigmas_type": "sigma_min"}, {"disable_corrector": [0, 2]})
    add("UniPCMultistep", {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"})
    add("LCM", {}, {"prediction_type": "v_prediction"}, {"original_inference_steps": 100}, draws=True)
    add("TCD", {}, {"prediction_type": "sample"}, draws=True)
    add("TCD", {}, draws=True, eta=0.8)
    return [pytest.param(name + "Scheduler", how, id=f"{name}-{number}") for number, (name, how) in enumerate(every)]


def both(name: str, config: dict[str, Any]) -> tuple[Any, Any]:
    config = {**({} if name == "IPNDMScheduler" else SD), **config}
    return getattr(named, name)(**config), theirs(name, json.dumps(config))


@functools.cache  # some of Diffusers' constructors take a second
def theirs(name: str, config: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations
        return getattr(diffusers, name)(**json.loads(config))


def assert_same(ours: Any, theirs: Any, steps: int, **how: Any) -> None:
    wanted = protocol(theirs, steps, **how)
    found = protocol(ours, steps, **how)
    # t of a noise level in float32, magnified where sigma(t) is flat; in ancestral steps it is a small difference too
    tolerance = 2e-2 if "Ancestral" in type(ours).__name__ else 2e-3
    assert torch.allclose(ours.timesteps.double(), theirs.timesteps.double(), rtol=1e-5, atol=tolerance)
    assert float(ours.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-5)
    # From sigma = 4096 Diffusers' Euler adds slope * step to x, and loses four digits of float32
    assert relative(found, wanted) < (1e-3 if "Euler" in type(ours).__name__ and max(theirs.sigmas) > 4000 else CLOSE)


@pytest.mark.parametrize(("name", "how"), cases())
def test_a_whole_loop_equals_diffusers(name: str, how: dict[str, Any]) -> None:
    how = dict(how)
    ours, theirs = both(name, how.pop("config"))
    for steps in (2, 20):
        assert_same(ours, theirs, steps, **how)


IN_THE_MIDDLE = [
    ("DDIM", {"clip_sample": False}, {}),
    ("DDIM", {}, {"draws": True, "eta": 0.5}),
    ("DDPM", {}, {"draws": True}),
    ("EulerDiscrete", {"use_karras_sigmas": True}, {}),
    ("EulerAncestralDiscrete", {}, {"draws": True}),
    ("HeunDiscrete", {}, {}),
    ("KDPM2Discrete", {"use_karras_sigmas": True}, {}),
    ("KDPM2AncestralDiscrete", {"timestep_spacing": "trailing", "steps_offset": 1}, {"draws": True}),
    ("DPMSolverMultistep", {}, {}),
    ("DPMSolverMultistep", {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}, {"draws": True}),
    ("DPMSolverSinglestep", {}, {}),
    ("DPMSolverSinglestep", {"solver_order": 3}, {}),
    ("DEISMultistep", {"solver_order": 3}, {}),
    ("UniPCMultistep", {}, {}),
    ("UniPCMultistep", {"solver_order": 3, "timestep_spacing": "trailing"}, {}),
    ("LCM", {}, {"draws": True}),
    ("TCD", {}, {"draws": True}),
]


@pytest.mark.parametrize(("name", "config", "how"), IN_THE_MIDDLE)
def test_a_loop_begun_in_the_middle_equals_diffusers(name: str, config: dict[str, Any], how: dict[str, Any]) -> None:
    """But for LMS and PNDM, which Diffusers begins wrongly."""
    for begin in (1, 7):
        assert_same(*both(name + "Scheduler", config), 20, begin=begin, **how)


SKIP = {"skip_prk_steps": True, "steps_offset": 1}
MISSED_BY_DIFFUSERS = [
    ("DDIM", {"timestep_spacing": "linspace", "clip_sample": False}, 20, 0),
    ("DDIM", {"timestep_spacing": "trailing", "clip_sample": False}, 14, 0),
    ("PNDM", {**SKIP, "timestep_spacing": "linspace"}, 20, 0),
    ("PNDM", {**SKIP, "timestep_spacing": "trailing"}, 14, 0),
    ("PNDM", {**SKIP, "prediction_type": "v_prediction"}, 20, 0),
    ("PNDM", SKIP, 20, 7),
    ("LMSDiscrete", {}, 20, 7),
]


@pytest.mark.parametrize(("name", "config", "steps", "begin"), MISSED_BY_DIFFUSERS)
def test_where_both_differ_diffusers_misses_the_image_that_the_true_noise_leads_to(
    name: str, config: dict[str, Any], steps: int, begin: int
) -> None:
    image, noise = normal(1), normal(2)
    schedulers = both(name + "Scheduler", {**config, **({"set_alpha_to_one": True} if name != "LMSDiscrete" else {})})
    missed = []
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps[begin:]
        if begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        x = scheduler.add_noise(image, noise, times[:1])
        for t in times:
            alpha = float(schedulers[0].alphas_cumprod[int(t)])
            velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * image
            output = velocity if config.get("prediction_type") == "v_prediction" else noise
            x = scheduler.step(output, t, x).prev_sample
        missed.append(relative(x, image))
    assert missed[0] < CLOSE
    assert missed[1] > 10 * CLOSE


@pytest.mark.parametrize("begin", [2, 3, 7, 19])
def test_plms_differs_in_the_middle_since_diffusers_takes_latents_for_those_of_the_next_timestep(begin: int) -> None:
    """It skips entries of a list in which one timestep comes twice, so model and solver are one entry ahead."""
    theirs, ours = diffusers.PNDMScheduler(**SD, **SKIP), named.PNDMScheduler(**SD, **SKIP)
    theirs.set_timesteps(20)
    found = start = normal(3)
    for t in theirs.timesteps[begin:]:
        found = theirs.step(wavy(found, t), t, found).prev_sample

    points = [*(schedule := ours.schedule(20)).points, schedule.end]
    assert float(theirs.timesteps[begin]) == points[begin - 1].t, "it also starts one step earlier"

    def noise(x: Tensor, at: Point) -> Tensor:
        return wavy(unit_variance(x, at.sigma), at.t)

    a, b = points[begin - 1 : begin + 1]
    x, eps = start * (1 + a.sigma**2) ** 0.5, [wavy(start, a.t)]  # x = x0 + sigma * eps
    predicted = x + eps[0] * (b.sigma - a.sigma)
    x = x + (eps[0] + noise(predicted, b)) / 2 * (b.sigma - a.sigma)  # Heun's method, as it should be
    for c, d in itertools.pairwise(points[begin + 1 :]):  # and these latents are at b
        x, b = unit_variance(x, b.sigma) * (1 + c.sigma**2) ** 0.5, d
        eps = [noise(x, c), *eps][:4]
        weights = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
        x = x + sum(w * e for w, e in zip(weights[len(eps) - 1], eps, strict=True)) * (d.sigma - c.sigma)
    assert relative(unit_variance(x, b.sigma), found) < CLOSE


@pytest.mark.parametrize("steps", [2, 3, 7, 15, 30, 333])
def test_plms_equals_diffusers_whatever_the_number_of_steps(steps: int) -> None:
    assert_same(*both("PNDMScheduler", SKIP), steps)


@pytest.mark.parametrize("steps", [4, 5, 20, 50])
def test_pndm_with_runge_kutta_steps_equals_diffusers(steps: int) -> None:
    assert_same(*both("PNDMScheduler", {"steps_offset": 1}), steps)


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "PNDM", "DPMSolverMultistep", "UniPCMultistep", "LCM"])
def test_a_single_step_equals_diffusers(name: str) -> None:
    config = {"skip_prk_steps": True} if name == "PNDM" else {}
    assert_same(*both(name + "Scheduler", config), 1, draws=name in ("DDPM", "LCM"))


def test_ipndm_equals_diffusers_from_its_second_step_on() -> None:
    """In the first one Diffusers loses the model's output; see docs/en/differences.md."""
    for steps in (5, 20):
        x = y = normal(3)
        ours, theirs = both("IPNDMScheduler", {})
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(steps)
            scheduler.set_begin_index(1)
        assert torch.allclose(ours.timesteps, theirs.timesteps, atol=1e-6)
        for t in ours.timesteps[1:]:
            x = ours.step(wavy(x, t * 1000), t, x).prev_sample
            y = theirs.step(wavy(y, t * 1000), t, y).prev_sample
        assert relative(x, y) < CLOSE


@pytest.mark.parametrize("config", [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "leading"}])
def test_dpm_sde_equals_diffusers_on_the_same_brownian_path(config: dict[str, Any]) -> None:
    ours, theirs = both("DPMSolverSDEScheduler", {**config, "noise_sampler_seed": 9})
    found = protocol(ours, 10)
    path = Noise(lambda: normal(0)).path(9)
    theirs.set_timesteps(10)
    set_timesteps, theirs.set_timesteps = theirs.set_timesteps, lambda n: None
    theirs.noise_sampler = lambda a, b: path(float(a), float(b))
    assert relative(found, protocol(theirs, 10)) < CLOSE
    set_timesteps(10)
    assert torch.allclose(ours.timesteps.double(), theirs.timesteps, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize(
    "name", ["EulerDiscrete", "HeunDiscrete", "LMSDiscrete", "DPMSolverMultistep", "UniPCMultistep"]
)
def test_sigmas_are_those_of_diffusers(name: str) -> None:
    ours, theirs = both(name + "Scheduler", {"use_karras_sigmas": True})
    ours.set_timesteps(12)
    theirs.set_timesteps(12)
    assert ours.timesteps.dtype == theirs.timesteps.dtype
    assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-6)


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete"])
def test_noise_is_added_as_diffusers_does_in_training(name: str) -> None:
    ours, theirs = getattr(named, name + "Scheduler")(**SD), getattr(diffusers, name + "Scheduler")(**SD)
    times = torch.tensor([3, 870])
    assert relative(ours.add_noise(normal(1), normal(2), times), theirs.add_noise(normal(1), normal(2), times)) < 1e-6
    if hasattr(theirs, "get_velocity"):
        times = times.float() if name == "EulerDiscrete" else times
        wanted = theirs.get_velocity(normal(1), normal(2), times)
        if name != "EulerDiscrete":  # there Diffusers reads its table from the wrong end
            assert relative(ours.get_velocity(normal(1), normal(2), times), wanted) < 1e-6


def test_custom_timesteps_and_sigmas_equal_diffusers() -> None:
    times = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    for name in ("EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep"):
        ours, theirs = both(name + "Scheduler", {})
        ours.set_timesteps(timesteps=times)
        theirs.set_timesteps(timesteps=times)
        assert torch.equal(ours.timesteps.double(), theirs.timesteps.double())
        assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-6)
    levels = [14.615, 6.475, 3.861, 2.697, 1.886, 0.963, 0.652, 0.399, 0.152, 0.0]
    ours, theirs = both("EulerDiscreteScheduler", {})
    ours.set_timesteps(sigmas=levels)
    theirs.set_timesteps(sigmas=levels)
    assert torch.allclose(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-3)
    assert torch.allclose(ours.sigmas, theirs.sigmas)
