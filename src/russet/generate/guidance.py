"""Guidance: how the model's answers at one timestep become one. Wrappers of ``Predict``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from russet.generate.engine import Predict

ALWAYS = (0.0, math.inf)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv:2207.12598).

    scale: how far to go from the unconditional towards the conditional output; 1 and below is no guidance.
    rescale: 0..1, how far the guided output's deviation is set back (arXiv:2305.08891, section 3.4).
    both: whether the solver needs the unconditional output as well (CFG++, arXiv:2406.08070).
    times: the lowest and the highest timestep that are guided (arXiv:2404.07724); at others the model is called with
        the prompt alone, and that output is taken.
    """

    scale: float = 7.5
    rescale: float = 0.0
    both: bool = False
    times: tuple[float, float] = ALWAYS

    @property
    def wanted(self) -> bool:
        return self.scale > 1 or self.both

    def guides(self, t: float) -> bool:
        """Whether the model is guided at a timestep."""
        return self.times[0] <= t <= self.times[1]


def guided(pair: Predict, guidance: Guidance) -> Predict:
    """Classifier-free guidance around a denoiser that returns 2B rows for B latents, the negative half first."""
    scale, rescale, both = guidance.scale, guidance.rescale, guidance.both

    def predict(x: Tensor, t: float) -> Tensor:
        without, with_prompt = pair(x, t).chunk(2)
        output = torch.add(without, with_prompt - without, alpha=scale)
        if rescale > 0:
            output = rescaled(output, with_prompt, rescale)
        return torch.cat([output, without], dim=1) if both else output

    return predict


def rescaled(output: Tensor, with_prompt: Tensor, rescale: float) -> Tensor:
    """Sets each image's deviation back towards that of the output with the prompt (arXiv:2305.08891, eq. 15–16)."""
    axes = tuple(range(1, output.dim()))
    same_deviation = output * (with_prompt.std(dim=axes, keepdim=True) / output.std(dim=axes, keepdim=True))
    return rescale * same_deviation + (1 - rescale) * output


def unguided_twice(predict: Predict) -> Predict:
    """For solvers that also take the unconditional output, where there is no guidance: the same output twice."""
    return lambda x, t: torch.cat([predict(x, t)] * 2, dim=1)


def in_interval(
    guides: Callable[[float], bool], inside: Callable[[], Predict], outside: Callable[[], Predict]
) -> Predict:
    """One denoiser for the timesteps that ``guides`` is true for, another one for all others.

    Each is made when its timesteps begin: what a denoiser keeps from step to step must not outlive a pause.
    """
    here: bool | None = None
    current: Predict

    def predict(x: Tensor, t: float) -> Tensor:
        nonlocal here, current
        if guides(t) != here:
            here = guides(t)
            current = inside() if here else outside()
        return current(x, t)

    return predict


def guidance_embedding(scale: float, width: int) -> Tensor:
    """[1, width]: the guidance scale as a distilled UNet takes it (arXiv:2310.04378, section 4.2).

    A sinusoidal embedding of 1000 × (scale − 1), sines first, frequencies from 1 to 1/10000.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device="cpu") * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (scale - 1.0) * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))[None]
