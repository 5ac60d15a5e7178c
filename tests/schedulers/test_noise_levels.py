from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from russet.errors import InputError
from russet.schedulers import configs, named, noise_levels
from russet.schedulers.noise_levels import CosineTable, NoiseTable

from .loops import SD

TABLE = named.DDIMScheduler(**SD).table
LOW, HIGH = 0.03, 14.6


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_table_is_that_of_diffusers(schedule: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    for changes in ({}, {"rescale_betas_zero_snr": True}):
        ours = named.DPMSolverMultistepScheduler(beta_schedule=schedule, **changes).table
        theirs = diffusers.DPMSolverMultistepScheduler(beta_schedule=schedule, **changes)
        assert torch.equal(ours.betas, theirs.betas)
        assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


def test_trained_betas_are_taken_as_they_are() -> None:
    betas = [0.1, 0.2, 0.3]
    scheduler = named.DDIMScheduler(num_train_timesteps=3, trained_betas=betas)
    assert torch.allclose(scheduler.table.betas, torch.tensor(betas))
    assert scheduler.table.sigma(0) == pytest.approx(math.sqrt(0.1 / 0.9))


def test_no_noise_level_is_infinite() -> None:
    table = NoiseTable(torch.tensor([0.5, 1.0]))
    assert table.sigma(1) == pytest.approx(2.0**20, rel=1e-6)


@settings(deadline=None)
@given(st.floats(0, 999))
def test_the_timestep_of_a_noise_level_is_where_it_came_from(t: float) -> None:
    # sigma is linear between entries, t in its logarithm: they differ within an entry
    assert abs(TABLE.t(TABLE.sigma(t)) - t) < 0.2
    assert abs(TABLE.t(TABLE.sigma(round(t))) - round(t)) < 2e-3


def test_timesteps_of_noise_levels_outside_the_table_are_its_ends() -> None:
    assert (TABLE.t(1e-9), TABLE.t(0.0), TABLE.t(1e6)) == (0, 0, 999)


@settings(deadline=None)
@given(st.floats(0, 0.999))
def test_ipndms_noise_levels_are_their_own_inverse(t: float) -> None:
    assert CosineTable().t(CosineTable().sigma(t)) == pytest.approx(t, abs=1e-9)


@settings(deadline=None)
@given(st.integers(1, 200), st.sampled_from(sorted(noise_levels.SEQUENCES)))
def test_noise_levels_fall_from_the_highest_to_the_lowest(steps: int, name: str) -> None:
    levels = noise_levels.SEQUENCES[name](steps, LOW, HIGH)
    assert len(levels) == steps
    assert levels[0] == pytest.approx(HIGH)
    assert all(after < before for before, after in pairwise(levels))
    assert steps == 1 or levels[-1] == pytest.approx(LOW)


@pytest.mark.parametrize("last", [1000, 930])
@settings(deadline=None)
@given(steps=st.integers(1, 500), name=st.sampled_from(configs.EVEN), extra=st.integers(0, 1))
def test_timesteps_fall_and_stay_in_the_table(last: int, steps: int, name: str, extra: int) -> None:
    times = noise_levels.spaced_timesteps(name, steps, 1000, last=last, extra=extra)
    assert len(times) == steps or (name == "trailing" and abs(len(times) - steps * last / 1000) <= 1)
    assert 0 <= times[-1] <= times[0] <= last - 1
    assert all(after < before for before, after in pairwise(times))


@pytest.mark.parametrize("steps", [61, 103, 998])
def test_trailing_timesteps_are_as_many_as_asked_for(steps: int) -> None:
    """Diffusers makes one more, at t = -1, where 1000 / steps rounds down."""
    assert len(named.DDIMScheduler(timestep_spacing="trailing").schedule(steps).timesteps) == steps


def test_a_single_linspace_step_starts_from_noise() -> None:
    assert named.EulerDiscreteScheduler(**SD).schedule(1).timesteps == (999.0,)


def test_beta_quantiles_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    p = np.array([0.0, 1e-6, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0])
    assert np.allclose(noise_levels.beta_quantiles(p, 0.6), stats.beta.ppf(p, 0.6, 0.6), atol=1e-9)


def test_polyexponential_with_rho_one_is_even_in_log_sigma() -> None:
    gaps = np.diff(np.log(noise_levels.polyexponential(9, LOW, HIGH)))
    assert np.allclose(gaps, gaps[0])
    late = noise_levels.polyexponential(9, LOW, HIGH, rho=2.0)
    assert (late < 1).sum() > (noise_levels.polyexponential(9, LOW, HIGH) < 1).sum()


@pytest.mark.parametrize("name", ["align_your_steps", "align_your_steps_xl"])
def test_ten_aligned_steps_are_the_published_ones(name: str) -> None:
    for cls in (named.DDIMScheduler, named.EulerDiscreteScheduler, named.DPMSolverMultistepScheduler):
        times = cls(**SD, timestep_spacing=name).schedule(10).timesteps
        assert times == pytest.approx(tuple(noise_levels.ALIGNED[name]), abs=2e-3)
    many = named.EulerDiscreteScheduler(**SD, timestep_spacing=name).schedule(33).points
    assert many[0].t == pytest.approx(999, abs=2e-3)
    assert all(after.sigma < before.sigma for before, after in pairwise(many))


def test_kl_optimal_levels_are_even_in_their_arctangent() -> None:
    gaps = np.diff(np.arctan(noise_levels.kl_optimal(7, LOW, HIGH)))
    assert np.allclose(gaps, gaps[0])


def test_simple_spacing_takes_every_nth_entry_from_the_end() -> None:
    assert named.EulerDiscreteScheduler(timestep_spacing="simple").schedule(4).timesteps == (999, 749, 499, 249)


def test_sgm_uniform_spacing_stops_one_step_short_of_zero() -> None:
    assert named.EulerDiscreteScheduler(timestep_spacing="sgm_uniform").schedule(3).timesteps == (999, 666, 333)


def test_more_steps_than_a_spacing_has_room_for_are_refused() -> None:
    cases = [
        ({"timestep_spacing": "leading", "steps_offset": 1}, 1000, r"the timesteps of 1000 steps must lie in 0\.\.999"),
        ({"timestep_spacing": "leading"}, 1001, "the number of steps must be at most 1000, not 1001"),
    ]
    for config, steps, message in cases:
        with pytest.raises(InputError, match=message):
            named.DDIMScheduler(**config).schedule(steps)
    with pytest.raises(InputError, match=r"noise levels of 1000 steps must fall"):
        named.DPMSolverMultistepScheduler(**SD).schedule(1000)
    assert len(named.DDIMScheduler(**SD, timestep_spacing="leading").schedule(1000).timesteps) == 1000
