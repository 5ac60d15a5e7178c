"""What the schedulers' tests share: a stand-in for a model, and the loop that Diffusers' pipelines make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Model = Callable[[Tensor, float], Tensor]


def wavy(x: Tensor, t: float) -> Tensor:
    """Depends on the input and on the timestep, smoothly, as a network does; never the exact answer."""
    return torch.sin(x * 1.3 + float(t) / 300) * 0.8 + x * 0.3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 8, 8)), generator=torch.Generator().manual_seed(seed))


def protocol(
    scheduler: Any, steps: int, begin: int = 0, draws: bool = False, model: Model = wavy, **step: Any
) -> Tensor:
    """The loop of Diffusers' pipelines: text to image, or image to image from the step ``begin`` on."""
    scheduler.set_timesteps(steps)
    times, x = scheduler.timesteps, normal(3) * float(scheduler.init_noise_sigma)
    if begin:
        times = times[begin * scheduler.order :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin * scheduler.order)
        x = scheduler.add_noise(normal(4), normal(3), times[:1])
    if draws:
        step["generator"] = torch.Generator().manual_seed(5)
    for t in times:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **step).prev_sample
    return x


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
