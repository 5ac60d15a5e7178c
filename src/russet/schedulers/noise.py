"""How much noise belongs to which timestep: the table that a model was trained with.

Units: a noisy latent is ``x = x0 + sigma * eps`` (variance-exploding), and ``alphas_cumprod = 1 / (1 + sigma²)`` is the
same fact in the variance-preserving form ``sqrt(a) * x0 + sqrt(1 - a) * eps``. A timestep ``t`` runs from 0 (almost no
noise) to ``num_train_timesteps - 1`` (almost only noise), and may be fractional. Everything here is on the CPU.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from russet.schedulers.configs import SchedulerConfig

ALMOST_PURE_NOISE = 2.0**-40  # the least alphas_cumprod: sigma = 2**20, so that no sigma is infinite


@dataclass(frozen=True)
class Point:
    """A place where the model can be evaluated: the timestep it is told, and the noise level ``sigma`` there.

    arrival: where a step to this point ends, below it, before noise is added up to ``sigma``; None is the point itself.
    """

    t: float
    sigma: float
    arrival: Point | None = None


class Table:
    """sigma(t) of a trained model. betas, alphas_cumprod: float32 [T], as Diffusers names them. last: the highest t."""

    def __init__(self, betas: Tensor, zero_snr: float | None = None):
        """zero_snr: the alphas_cumprod that stands for zero at the last step, after rescaling the betas to reach it."""
        self.betas = betas if zero_snr is None else rescaled_to_zero_snr(betas)
        # float32 as the checkpoints' own tables are; float64 would move sigma at t = 0 by 3e-5 of itself
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        if zero_snr is not None:
            self.alphas_cumprod[-1] = zero_snr
        kept = self.alphas_cumprod.clamp(min=ALMOST_PURE_NOISE)
        self.sigmas = (((1 - kept) / kept) ** 0.5).double().numpy()
        self.log_sigmas = np.log(self.sigmas.astype(np.float32)).astype(np.float64)
        self.grid, self.last = np.arange(len(self.sigmas)), float(len(self.sigmas) - 1)

    def sigma(self, t: float) -> float:
        return float(np.interp(t, self.grid, self.sigmas))

    def t(self, sigma: float) -> float:
        """The timestep of a noise level, linear in log(sigma) between two entries, clipped to the table."""
        return float(np.interp(math.log(max(sigma, 1e-10)), self.log_sigmas, self.grid))


class CosineTable(Table):
    """IPNDM's own noise levels: t in 0..1 and sigma = tan(pi t / 2)."""

    def __init__(self) -> None:
        self.sigmas, self.last = np.tan(np.linspace(0.0, 1.0, 1001)[:-1] * math.pi / 2), 1.0
        self.alphas_cumprod = torch.from_numpy(1 / (1 + self.sigmas**2)).float()
        self.betas = 1 - self.alphas_cumprod / torch.cat([torch.ones(1, device="cpu"), self.alphas_cumprod[:-1]])

    def sigma(self, t: float) -> float:
        return min(math.tan(t * math.pi / 2), 2.0**12)  # at t = 1 there is nothing but noise; kept finite

    def t(self, sigma: float) -> float:
        return math.atan(sigma) * 2 / math.pi


def betas_of(config: SchedulerConfig) -> Tensor:
    """The betas [T] that a config describes, float32."""
    steps, start, end = config.num_train_timesteps, config.key("beta_start"), config.key("beta_end")
    if config.key("trained_betas") is not None:
        return torch.tensor(config.key("trained_betas"), dtype=torch.float32, device="cpu")
    if config.key("beta_schedule") == "squaredcos_cap_v2":
        return cosine_betas(steps)
    if config.key("beta_schedule") == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32, device="cpu") ** 2
    return torch.linspace(start, end, steps, dtype=torch.float32, device="cpu")


def cosine_betas(steps: int) -> Tensor:
    """Betas whose running product of 1 - beta is a squared cosine (arXiv:2102.09672, equation 17); none above 0.999."""
    bars = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return torch.tensor([min(1 - after / before, 0.999) for before, after in itertools.pairwise(bars)], device="cpu")


def rescaled_to_zero_snr(betas: Tensor) -> Tensor:
    """Betas changed so that the last step is pure noise, the first one as before (arXiv:2305.08891, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
