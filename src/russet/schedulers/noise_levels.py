"""Noise levels: the table of a trained model, from timesteps to noise levels, and named ways to space the steps.

Units: a noisy latent is ``x = x0 + sigma * eps`` (variance-exploding), or with ``alphas_cumprod = 1 / (1 + sigma²)`` in
the variance-preserving form ``sqrt(a) * x0 + sqrt(1 - a) * eps``. A timestep ``t`` runs from 0 (almost no noise) to
``num_train_timesteps - 1`` (almost only noise), and may be fractional. Everything here is on the CPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from russet.schedulers.configs import SchedulerConfig

if TYPE_CHECKING:
    import numpy.typing as npt

    Values = npt.NDArray[np.float64]

ALMOST_PURE_NOISE = 2.0**-40  # the least alphas_cumprod: sigma = 2**20, so that no sigma is infinite


@dataclass(frozen=True)
class Point:
    """Where the model can be evaluated: the timestep that it takes, and the noise level ``sigma``.

    arrival: the lower point where a step to this one ends, before noise is added up to ``sigma``; None: this point.
    """

    t: float
    sigma: float
    arrival: Point | None = None


class NoiseTable:
    """sigma(t) of a trained model. betas, alphas_cumprod: float32 [T], as Diffusers names them. last: the highest t."""

    def __init__(self, betas: Tensor, zero_snr: float | None = None):
        """zero_snr: if given, betas are rescaled to zero terminal SNR; it is the last alphas_cumprod in place of 0."""
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


class CosineTable(NoiseTable):
    """IPNDM's own noise levels: t in 0..1 and sigma = tan(pi t / 2)."""

    def __init__(self) -> None:
        self.sigmas, self.last = np.tan(np.linspace(0.0, 1.0, 1001)[:-1] * math.pi / 2), 1.0
        self.alphas_cumprod = torch.from_numpy(1 / (1 + self.sigmas**2)).float()
        self.betas = 1 - self.alphas_cumprod / torch.cat([torch.ones(1, device="cpu"), self.alphas_cumprod[:-1]])

    def sigma(self, t: float) -> float:
        return min(math.tan(t * math.pi / 2), 2.0**12)  # at t = 1 there is only noise; kept finite

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


# -- where the steps are: each function returns ``steps`` values from the noisiest down, without the end

# arXiv:2404.14507, table of the quick-start guide: optimised for ten steps of Stable Diffusion 1.5 and XL
ALIGNED: Mapping[str, Sequence[int]] = {
    "align_your_steps": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "align_your_steps_xl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}


def spaced_timesteps(name: str, steps: int, train: int, *, last: int, offset: int = 0, extra: int = 0) -> Values:
    """Timesteps by the names of arXiv:2305.08891, table 2, and two of ComfyUI's; not rounded.

    train: how many the model was trained with. last: how many of those are used (the noisiest may be cut off).
    extra: the spacing is that of so many more steps, whose last ones are left out (DPM-Solver and its successors).
    """
    laid_out = steps + extra
    if name == "leading":
        return np.asarray((np.arange(laid_out) * (last // laid_out))[::-1][:steps] + float(offset))
    if name == "trailing":
        each = train / steps
        times = np.round(last - np.arange(steps) * each) - 1
        return np.asarray(times[times >= 0])  # fewer where the noisiest are cut off
    if name == "simple":
        return np.asarray(last - 1 - np.floor(np.arange(steps) * (last / steps)))
    if name == "sgm_uniform":
        return np.linspace(last - 1, 0, steps + 1)[:-1]
    if laid_out == 1:
        return np.array([last - 1.0])  # differs from Diffusers: a single step starts from noise, not from t = 0
    return np.linspace(0, last - 1, laid_out)[::-1][:steps]


def spaced_sigmas(name: str, steps: int, low: float, high: float, table: NoiseTable) -> Values:
    """Noise levels from ``high`` to ``low`` by name; those of align_your_steps are the table's own down to ``low``."""
    if name not in ALIGNED:
        return SEQUENCES[name](steps, low, high)
    levels = [*(table.sigma(t) for t in ALIGNED[name]), low]  # for another number of steps, linear in log(sigma)
    at = np.linspace(0, len(levels) - 1, steps + 1)[:-1]
    return np.exp(np.interp(at, np.arange(len(levels)), np.log(levels)))


def karras(steps: int, low: float, high: float, rho: float = 7.0) -> Values:
    """arXiv:2206.00364, equation 5."""
    ramp = np.linspace(0, 1, steps)
    return np.asarray((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho)


def polyexponential(steps: int, low: float, high: float, rho: float = 1.0) -> Values:
    """Even in log(sigma) where ``rho`` is 1; a larger ``rho`` spends more steps on the low noise (k-diffusion)."""
    ramp = np.linspace(1, 0, steps) ** rho
    return np.exp(ramp * (math.log(high) - math.log(low)) + math.log(low))


def beta(steps: int, low: float, high: float, alpha: float = 0.6) -> Values:
    """Quantiles of the Beta(alpha, alpha) distribution, dense at both ends (arXiv:2407.12173)."""
    return low + beta_quantiles(1 - np.linspace(0, 1, steps), alpha) * (high - low)


def kl_optimal(steps: int, low: float, high: float) -> Values:
    """Even in arctan(sigma): least KL divergence for Gaussian data (arXiv:2404.14507, theorem 3.1)."""
    return np.tan(np.linspace(math.atan(high), math.atan(low), steps))


SEQUENCES: Mapping[str, Callable[[int, float, float], Values]] = {
    "karras": karras,
    "exponential": polyexponential,
    "beta": beta,
    "kl_optimal": kl_optimal,
    "lu": polyexponential,  # even in log(sigma) too, with rounded timesteps (arXiv:2211.01095)
}


def beta_quantiles(p: Values, alpha: float) -> Values:
    """The x in 0..1 below which Beta(alpha, alpha) has the probabilities ``p``, by bisection on the lower half."""
    below, above = np.zeros_like(p), np.full_like(p, 0.5)
    for _ in range(60):
        middle = (below + above) / 2
        low = beta_cdf(middle, alpha) < np.minimum(p, 1 - p)
        below, above = np.where(low, middle, below), np.where(low, above, middle)
    return np.where(p > 0.5, 1 - below, below)


def beta_cdf(x: Values, alpha: float) -> Values:
    """The regularised incomplete beta function I_x(alpha, alpha) for x up to 1/2, by its power series (DLMF 8.17.8)."""
    total, term = np.zeros_like(x), np.ones_like(x)
    for n in range(60):  # each term is at most half the one before
        total = total + term / (alpha + n)
        term = term * x * ((n + 1 - alpha) / (n + 1))
    return np.asarray(total * x**alpha * (math.gamma(2 * alpha) / math.gamma(alpha) ** 2))
