from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Generator, Tensor

from russet.errors import InputError
from russet.rng import BrownianPath, Noise, draw
from russet.schedulers import named

from .schedulers.loops import SD

LEVELS = (14.6, 9.0, 3.0, 1.1, 1.0, 0.4, 0.05, 0.03)
CPU = torch.device("cpu")


def duration(a: float, b: float) -> float:
    return b**-2 - a**-2


def test_increments_add_up() -> None:
    path = BrownianPath(3, (4, 8, 8))
    for a, b, c in ((14.6, 3.0, 0.4), (3.0, 1.1, 1.0), (1.0, 0.05, 0.03)):
        parts = math.sqrt(duration(a, b)) * path.between(a, b) + math.sqrt(duration(b, c)) * path.between(b, c)
        whole = math.sqrt(duration(a, c)) * path.between(a, c)
        assert torch.allclose(parts, whole, atol=1e-5 * float(whole.abs().max()))


def test_the_path_depends_on_the_seed_and_the_place_alone() -> None:
    forward = [BrownianPath(3, (4,)).at(level) for level in LEVELS]
    path = BrownianPath(3, (4,))
    backward = [path.at(level) for level in reversed(LEVELS)]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))


def test_increments_are_standard_normal_and_independent() -> None:
    path = BrownianPath(7, (10_000,))
    found = torch.stack([path.between(a, b) for a, b in pairwise(LEVELS)])
    # five standard errors of a mean, of a deviation and of a correlation of 10 000 samples
    assert float(found.mean(1).abs().max()) < 5 / 100
    assert float((found.std(1) - 1).abs().max()) < 5 / (100 * math.sqrt(2))
    assert float((torch.corrcoef(found) - torch.eye(len(found))).abs().max()) < 5 / 100


def test_paths_of_different_seeds_are_independent() -> None:
    found = torch.stack([BrownianPath(seed, (10_000,)).between(9.0, 1.0) for seed in range(4)])
    assert float((torch.corrcoef(found) - torch.eye(4)).abs().max()) < 5 / 100


def test_the_smallest_steps_of_a_long_run_have_the_right_deviation_too() -> None:
    path, level, found = BrownianPath(1, (2000,)), 10.0, []
    for _ in range(20):
        found.append(path.between(level, level * 0.994))  # a thousand such steps cover the whole range
        level *= 0.994
    assert float(torch.stack(found).std()) == pytest.approx(1.0, abs=0.03)


def test_the_seed_of_an_image_is_read_from_its_own_stream() -> None:
    def paths(seeds: tuple[int, ...]) -> Tensor:
        generators = [Generator().manual_seed(seed) for seed in seeds]
        return Noise(lambda: draw((len(seeds), 4, 4), generators, CPU)).path()(9.0, 1.0)

    assert torch.equal(paths((5, 6, 7))[1], paths((6,))[0])
    assert not torch.equal(paths((5,))[0], paths((6,))[0])


def test_a_configured_seed_wins_over_the_stream() -> None:
    noise = Noise(lambda: torch.randn(2, 4, 4))
    assert torch.equal(noise.path(3)(9.0, 1.0), noise.path(3)(9.0, 1.0))
    first, second = noise.path(3)(9.0, 1.0)
    assert not torch.equal(first, second)
    assert torch.equal(noise.path((8, 9))(9.0, 1.0)[1], BrownianPath(9, (4, 4)).between(9.0, 1.0))
    with pytest.raises(InputError, match="noise_sampler_seed has 3 seeds for 2 images"):
        noise.path((1, 2, 3))(9.0, 1.0)


def test_dpm_sde_adds_the_same_noise_in_any_number_of_steps() -> None:
    """Where the image stays the same, one large step is what its parts add up to, on the path's clock."""
    scheduler = named.DPMSolverSDEScheduler(**SD, prediction_type="sample", noise_sampler_seed=1)
    image, ends = torch.randn(1, 4, 4, 4), []
    for steps in (3, 12, 40):
        sigmas = [10.0 * (0.05 ** (i / steps)) for i in range(steps + 1)]
        run = scheduler.schedule(sigmas=sigmas).run(10 * torch.ones(1, 4, 4, 4), lambda: torch.randn(1, 4, 4, 4))
        while run.t is not None:
            run.send(image)
        ends.append(run.latents)
    assert torch.allclose(ends[0], ends[1], atol=1e-4)
    assert torch.allclose(ends[0], ends[2], atol=1e-4)


def test_noise_for_a_batch_is_drawn_as_diffusers_draws_it() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    for count in (1, 3):
        ours, theirs = ([Generator().manual_seed(i) for i in range(count)] for _ in range(2))
        wanted = randn_tensor((3, 4, 8, 8), generator=theirs if count > 1 else theirs[0], device=CPU)
        assert torch.equal(draw((3, 4, 8, 8), ours, CPU), wanted)
