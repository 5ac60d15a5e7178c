"""Programs with a loop of their own: the schedulers' numbers on the CPU, the latents on a virtual Mac."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from russet import DDIMScheduler, EulerDiscreteScheduler
from russet.schedulers.scheduler import Scheduler

from .virtual_mps import VirtualMac


@pytest.fixture
def mac() -> Iterator[VirtualMac]:
    with VirtualMac(bugs=["scalar-views"]) as one:
        yield one


def latents(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def euler() -> EulerDiscreteScheduler:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    return scheduler


USES: dict[str, Callable[[Scheduler, Tensor], Tensor]] = {
    "a sigma": lambda scheduler, x: scheduler.sigmas[2] * x,
    "a sigma, in place": lambda scheduler, x: x.clone().mul_(scheduler.sigmas[2]),
    "the difference of two": lambda scheduler, x: x + (scheduler.sigmas[2] - scheduler.sigmas[1]) * x,
    "a sigma from the end": lambda scheduler, x: x - scheduler.sigmas[-2],
    "a sigma of a part": lambda scheduler, x: scheduler.sigmas[1:][1] * x,
    "one by one": lambda scheduler, x: sum((sigma * x for sigma in scheduler.sigmas[1:]), x),
    "in pairs": lambda scheduler, x: [a * x - b for a, b in zip(scheduler.sigmas, scheduler.sigmas[1:], strict=False)][
        2
    ],
    "backwards": lambda scheduler, x: next(iter(reversed(scheduler.sigmas[:-2]))) * x,
    "unbound": lambda scheduler, x: scheduler.sigmas.unbind()[3] * x,
    "selected": lambda scheduler, x: scheduler.sigmas.select(0, 3) * x,
    "in another precision": lambda scheduler, x: scheduler.sigmas.to(torch.float16)[2] * x,
    "reckoned with": lambda scheduler, x: (scheduler.sigmas**2 + 1).sqrt()[2] * x,
    "after joining": lambda scheduler, x: torch.cat([scheduler.sigmas, scheduler.sigmas[:1]])[2] * x,
    "alphas": lambda scheduler, x: scheduler.alphas_cumprod[500] * x,
    "alphas by a timestep": lambda scheduler, x: scheduler.alphas_cumprod[scheduler.timesteps[2].long()] * x,
    "alphas by several": lambda scheduler, x: scheduler.alphas_cumprod[torch.tensor([5, 500])][1] * x,
    "betas": lambda scheduler, x: scheduler.betas[500] * x,
    "a timestep": lambda scheduler, x: x * (scheduler.timesteps[2] / 1000) - scheduler.timesteps[3],
    "the first sigma": lambda scheduler, x: scheduler.sigmas.max() * x,
}


@pytest.mark.parametrize("use", USES)
def test_a_number_of_a_scheduler_times_latents_on_mps_is_as_on_the_cpu(use, mac):
    expected = USES[use](euler(), latents())
    assert torch.equal(USES[use](euler(), latents().to("mps")).cpu(), expected)


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, DDIMScheduler])
def test_a_loop_of_steps_on_mps_is_as_on_the_cpu(cls, mac):
    def loop(device: str, steps_on: str | None) -> Tensor:
        scheduler = cls()
        scheduler.set_timesteps(5, device=steps_on)
        x = latents().to(device) * scheduler.init_noise_sigma
        x = scheduler.add_noise(x, latents(1).to(device), scheduler.timesteps[1:2])
        for t in scheduler.timesteps:
            output = 0.1 * scheduler.scale_model_input(x, t)
            x = scheduler.step(output, t, x).prev_sample
        return scheduler.get_velocity(x, latents(2).to(device), scheduler.timesteps[2]).cpu()

    expected = loop("cpu", None)
    for steps_on in (None, "mps"):
        assert torch.equal(loop("mps", steps_on), expected)


def test_latents_do_not_become_what_a_schedulers_numbers_are(mac):
    scheduler = euler()
    for x in (latents(), latents().to("mps")):
        sigma = scheduler.sigmas[2]
        assert type(sigma) is Tensor
        made = (sigma * x, scheduler.sigmas.to(x.device)[2] * x, x * scheduler.sigmas[:2].to(x.device).view(2, 1, 1, 1))
        assert [type(y) for y in made] == [type(x)] * 3
