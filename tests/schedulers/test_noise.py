from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from russet.schedulers import named
from russet.schedulers.noise import CosineTable, Table

from .loops import SD

TABLE = named.DDIMScheduler(**SD).table


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
    table = Table(torch.tensor([0.5, 1.0]))
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
