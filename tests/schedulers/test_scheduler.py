from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch

from russet.errors import ArgumentTypeError, InputError, UnsupportedArgument
from russet.schedulers import named

from .loops import SD, normal, protocol


def euler() -> named.EulerDiscreteScheduler:
    return named.EulerDiscreteScheduler(**SD)


BAD_STEPS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, InputError, "exactly one of steps, timesteps, sigmas, not none"),
    ({"steps": 3, "timesteps": [5]}, InputError, "not steps and timesteps"),
    ({"steps": 0}, InputError, r"number of steps must be at least 1, not 0"),
    ({"steps": -3}, InputError, "not -3"),
    ({"steps": 1001}, InputError, "at most 1000, not 1001"),
    ({"steps": True}, ArgumentTypeError, "whole number, not True"),
    ({"steps": 3.0}, ArgumentTypeError, "whole number, not 3.0"),
    ({"steps": "20"}, ArgumentTypeError, "whole number, not '20'"),
    ({"timesteps": []}, InputError, "at least one number"),
    ({"timesteps": "999"}, ArgumentTypeError, "list of numbers"),
    ({"timesteps": 999}, ArgumentTypeError, "list of numbers"),
    ({"timesteps": [900, "5"]}, ArgumentTypeError, r"timesteps\[1\] must be a number, not '5'"),
    ({"timesteps": [900, True]}, ArgumentTypeError, r"timesteps\[1\] must be a number, not True"),
    ({"timesteps": [900, 900, 3]}, InputError, "must fall from step to step; 900 comes after 900"),
    ({"timesteps": [3, 900]}, InputError, "900 comes after 3"),
    ({"timesteps": [1000, 3]}, InputError, r"0\.\.999, where the model was trained; 1000 does not"),
    ({"timesteps": [10, -1]}, InputError, "-1 does not"),
    ({"timesteps": [math.nan, 1]}, InputError, "finite"),
    ({"sigmas": [3.0]}, InputError, "two or more"),
    ({"sigmas": [3.0, 1.0, -1.0]}, InputError, "end at 0 or above"),
    ({"sigmas": [1.0, 3.0, 0.0]}, InputError, "must fall"),
    ({"sigmas": [math.inf, 0.0]}, InputError, "finite"),
    ({"steps": 3, "eta": 0.5}, UnsupportedArgument, "EulerDiscreteScheduler does not take eta"),
    ({"steps": 3, "s_churn": 1.0}, UnsupportedArgument, "does not take s_churn"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD_STEPS)
def test_a_schedule_that_cannot_be_made_is_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        euler().schedule(**given)
    if "steps" in given:
        given = {**given, "num_inference_steps": given["steps"]}
        del given["steps"]
    with pytest.raises((InputError, UnsupportedArgument)):
        euler().set_timesteps(**given)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    wanted = euler().schedule(timesteps=[900, 10]).timesteps
    assert euler().schedule(timesteps=np.array([900, 10])).timesteps == wanted  # type: ignore[arg-type]
    assert euler().schedule(timesteps=torch.tensor([900, 10])).timesteps == wanted  # type: ignore[arg-type]
    assert len(euler().schedule(np.int64(7)).timesteps) == 7  # type: ignore[arg-type]


def test_eta_is_a_share() -> None:
    for eta, error in ((1.5, InputError), (-0.1, InputError), (math.nan, InputError), ("1", ArgumentTypeError)):
        with pytest.raises(error, match="eta must"):
            named.DDIMScheduler().schedule(3, eta=eta)  # type: ignore[arg-type]


def test_whole_timesteps_are_asked_for_where_the_model_knows_no_others() -> None:
    with pytest.raises(InputError, match=r"whole numbers for this scheduler; 3\.5"):
        named.DDIMScheduler().schedule(timesteps=[10, 3.5])
    assert euler().schedule(timesteps=[10, 3.5]).timesteps == (10, 3.5)


def test_timesteps_and_a_sigma_schedule_exclude_each_other() -> None:
    with pytest.raises(InputError, match="sigma schedule karras"):
        named.EulerDiscreteScheduler(use_karras_sigmas=True).schedule(timesteps=[900, 10])


def test_any_scheduler_takes_timesteps_and_sigmas() -> None:
    for cls in (named.DDIMScheduler, named.PNDMScheduler, named.UniPCMultistepScheduler, named.LCMScheduler):
        assert cls(**SD).schedule(timesteps=[999, 700, 20]).points[1].t == 700
        schedule = cls(**SD).schedule(sigmas=[10.0, 3.0, 1.0, 0.0])
        assert [point.sigma for point in schedule.points] == [10.0, 3.0, 1.0]
        assert schedule.end.sigma == 0


def test_sigmas_that_end_above_zero_end_there() -> None:
    for cls in (named.HeunDiscreteScheduler, named.KDPM2DiscreteScheduler, named.DPMSolverMultistepScheduler):
        schedule = cls(**SD, prediction_type="sample").schedule(sigmas=[10.0, 3.0, 1.0])
        image, noise = normal(1), normal(2)
        run = schedule.run(schedule.add_noise(image, noise), lambda: normal(3))
        while run.t is not None:
            run.send(image)
        wanted = schedule.parameterization.to_public(image + noise, 1.0)
        assert torch.allclose(run.latents, wanted, atol=1e-4)


def test_lcm_makes_no_more_steps_than_it_was_distilled_for() -> None:
    with pytest.raises(InputError, match="distilled for 50 steps"):
        named.LCMScheduler().schedule(51)


# -- the step protocol


def test_a_step_before_set_timesteps_says_what_to_call() -> None:
    for call in (
        lambda s: s.step(normal(1), 999, normal(2)),
        lambda s: s.scale_model_input(normal(1), 999),
    ):
        with pytest.raises(InputError, match="call set_timesteps before"):
            call(euler())


def test_a_timestep_that_was_not_asked_for_is_refused() -> None:
    scheduler = euler()
    scheduler.set_timesteps(4)
    for t in (5, 998.5, torch.tensor(3)):
        with pytest.raises(InputError, match="no step starts at timestep"):
            scheduler.step(normal(1), t, normal(2))
    scheduler.step(normal(1), 999, normal(2))
    with pytest.raises(InputError, match=r"step 1 is at timestep 666.0, not 999.0; call set_timesteps to start again"):
        scheduler.step(normal(1), 999, normal(2))
    for _ in range(3):
        scheduler.step(normal(1), scheduler.timesteps[scheduler.step_index], normal(2))
    with pytest.raises(InputError, match="every step has been made"):
        scheduler.step(normal(1), 0, normal(2))


def test_what_is_no_timestep_is_refused() -> None:
    scheduler = euler()
    scheduler.set_timesteps(4)
    for t in ("999", True, None, torch.tensor([999.0, 1.0]), [999]):
        with pytest.raises(ArgumentTypeError, match="a timestep must be one number"):
            scheduler.step(normal(1), t, normal(2))  # type: ignore[arg-type]


def test_tensors_that_do_not_fit_are_refused_and_the_run_goes_on() -> None:
    scheduler = euler()
    scheduler.set_timesteps(2)
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (normal(1, 2, 4, 8, 4), normal(2), InputError, r"model_output is \[2, 4, 8, 4\], but the sample is"),
        (normal(1).long(), normal(2), InputError, "model_output must be"),
        (normal(1), [1.0], ArgumentTypeError, r"sample must be a tensor, not \[1\.0\] \(list\)"),
        (normal(1, 8), normal(2, 8), InputError, "sample must be"),
    ]
    for output, sample, error, message in cases:
        with pytest.raises(error, match=message):
            scheduler.step(output, 999, sample)
    x = normal(2)
    for t in scheduler.timesteps:
        x = scheduler.step(normal(1), t, x).prev_sample


def test_generators_that_do_not_fit_are_refused() -> None:
    scheduler = named.EulerAncestralDiscreteScheduler(**SD)
    scheduler.set_timesteps(2)
    with pytest.raises(InputError, match="a list of 3 for a batch of 2"):
        scheduler.step(normal(1), 999, normal(2), generator=[torch.Generator()] * 3)
    for generator in (42, [1, 2]):
        with pytest.raises(ArgumentTypeError, match=r"torch\.Generator"):
            scheduler.step(normal(1), 999, normal(2), generator=generator)  # type: ignore[arg-type]


def test_unknown_arguments_are_refused_by_name() -> None:
    scheduler = euler()
    scheduler.set_timesteps(2)
    with pytest.raises(UnsupportedArgument, match="EulerDiscreteScheduler does not take s_churn"):
        scheduler.step(normal(1), 999, normal(2), s_churn=1.0)
    with pytest.raises(UnsupportedArgument, match="does not take variance_noise"):
        scheduler.step(normal(1), 999, normal(2), variance_noise=normal(3))
    with pytest.raises(UnsupportedArgument, match=r"set_timesteps\(\) has no argument 'mu'"):
        scheduler.set_timesteps(2, mu=1.0)


def test_options_stay_the_same_during_a_run() -> None:
    scheduler = named.DDIMScheduler(**SD)
    scheduler.set_timesteps(3)
    scheduler.step(normal(1), scheduler.timesteps[0], normal(2), eta=0.5)
    with pytest.raises(InputError, match="options must be the same in each step"):
        scheduler.step(normal(1), scheduler.timesteps[1], normal(2), eta=0.4)


def test_loops_written_for_diffusers_find_eta_where_they_look_for_it() -> None:
    for cls in (named.DDIMScheduler, named.EulerDiscreteScheduler):
        scheduler = cls(**SD)
        assert {"eta", "generator"} <= inspect.signature(scheduler.step).parameters.keys()
        scheduler.set_timesteps(2)
        scheduler.step(normal(1), scheduler.timesteps[0], normal(2), eta=0.0)
    with pytest.raises(UnsupportedArgument, match="EulerDiscreteScheduler does not take eta"):
        scheduler.step(normal(1), scheduler.timesteps[1], normal(2), eta=0.5)


def test_noise_can_be_given_in_place_of_a_generator() -> None:
    scheduler = named.DDIMScheduler(**SD)
    results = []
    for how in ({"generator": torch.Generator().manual_seed(8)}, {"variance_noise": normal(8)}):
        scheduler.set_timesteps(3)
        results.append(scheduler.step(normal(1), scheduler.timesteps[0], normal(2), eta=1.0, **how).prev_sample)
    assert torch.equal(*results)
    both: dict[str, Any] = {"generator": torch.Generator(), "variance_noise": normal(8)}
    with pytest.raises(InputError, match="not both"):
        scheduler.step(normal(1), scheduler.timesteps[1], normal(2), eta=1.0, **both)


def test_a_step_returns_both_results_by_name_and_by_place() -> None:
    for return_dict in (True, False):
        scheduler = euler()
        scheduler.set_timesteps(2)
        output = scheduler.step(normal(1), 999, normal(2), return_dict=return_dict)
        previous, original = output
        assert torch.equal(output[0], previous)
        assert torch.allclose(original, normal(2) - scheduler.sigmas[0] * normal(1), atol=1e-5)
        assert (type(output) is tuple) is not return_dict


def test_a_run_can_begin_by_its_timestep_alone_as_in_old_pipelines() -> None:
    for name in ("EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "PNDM", "LMSDiscrete"):
        scheduler = getattr(named, name + "Scheduler")({**SD, "skip_prk_steps": True})
        scheduler.set_timesteps(10)
        begin = 4 * scheduler.order
        x = wanted = scheduler.add_noise(normal(1), normal(2), scheduler.timesteps[begin])
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(normal(2), t, x).prev_sample
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(begin)
        for t in scheduler.timesteps[begin:]:
            wanted = scheduler.step(normal(2), t, wanted).prev_sample
        assert torch.equal(x, wanted)


def test_a_run_cannot_begin_inside_a_step() -> None:
    scheduler = named.HeunDiscreteScheduler(**SD)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(3)
    with pytest.raises(InputError, match=r"call 3 is inside a step; steps start at the calls \[0, 2, 4, 6, 8\]"):
        scheduler.step(normal(1), scheduler.timesteps[3], normal(2))
    scheduler.set_begin_index(99)
    with pytest.raises(InputError, match="every step has been made"):
        scheduler.step(normal(1), 999, normal(2))
    with pytest.raises(ArgumentTypeError, match="begin_index must be a whole number"):
        scheduler.set_begin_index("3")  # type: ignore[arg-type]


def test_set_timesteps_begins_anew_after_any_number_of_steps() -> None:
    scheduler = named.UniPCMultistepScheduler(**SD)
    wanted = protocol(scheduler, 6)
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps[:3]:
        scheduler.step(normal(1), t, normal(2))
    assert torch.equal(protocol(scheduler, 6), wanted)


def test_noise_levels_inside_a_run_are_those_of_the_run() -> None:
    """Karras' noise levels have timesteps of their own, which the table knows only roughly."""
    scheduler = named.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)
    scheduler.set_timesteps(10)
    noisy = scheduler.add_noise(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8), scheduler.timesteps[4:5])
    sigma = float(scheduler.sigmas[4])
    assert float(noisy.mean()) == pytest.approx(sigma / math.sqrt(1 + sigma**2), rel=1e-6)


def test_each_image_has_its_own_timestep_in_training() -> None:
    scheduler = named.DDPMScheduler(**SD)
    image, noise = normal(1), normal(2)
    together = scheduler.add_noise(image, noise, torch.tensor([10, 900]))
    for row, t in enumerate((10, 900)):
        assert torch.allclose(
            together[row : row + 1], scheduler.add_noise(image[row : row + 1], noise[row : row + 1], t)
        )
    with pytest.raises(InputError, match="3 timesteps for a batch of 2"):
        scheduler.add_noise(image, noise, torch.tensor([1, 2, 3]))
    with pytest.raises(InputError, match=r"0\.\.999"):
        scheduler.add_noise(image, noise, 1000)


def test_noise_and_velocity_are_two_sides_of_one_latent() -> None:
    scheduler = named.DDIMScheduler(**SD)
    image, noise = normal(1), normal(2)
    noisy, velocity = scheduler.add_noise(image, noise, 400), scheduler.get_velocity(image, noise, 400)
    alpha = float(scheduler.table.alphas_cumprod[400])
    assert torch.allclose(math.sqrt(alpha) * noisy - math.sqrt(1 - alpha) * velocity, image, atol=1e-5)


def test_a_scheduler_can_be_copied_after_a_run() -> None:
    scheduler = named.LMSDiscreteScheduler(**SD)
    wanted = protocol(scheduler, 5)
    assert torch.equal(protocol(copy.deepcopy(scheduler), 5), wanted)
    assert len(scheduler) == 1000


def test_timesteps_have_diffusers_dtypes_and_never_float64() -> None:
    for name, kind in (("DDIM", torch.int64), ("EulerDiscrete", torch.float32), ("KDPM2Discrete", torch.float32)):
        scheduler = getattr(named, name + "Scheduler")(SD)
        assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
        scheduler.set_timesteps(4, device="cpu")
        assert scheduler.timesteps.dtype == kind
        assert scheduler.sigmas.dtype == torch.float32
