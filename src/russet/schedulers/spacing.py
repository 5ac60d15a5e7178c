"""Where the steps are: named spacings of the timesteps, and named sequences of noise levels.

Each function gives ``steps`` values from the noisiest down, the end not among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from russet.schedulers.noise import Table

Values = npt.NDArray[np.float64]

# arXiv:2404.14507, table of the quick-start guide: optimised for ten steps of Stable Diffusion 1.5 and XL
ALIGNED: Mapping[str, Sequence[int]] = {
    "align_your_steps": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "align_your_steps_xl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}


def timesteps(name: str, steps: int, train: int, *, last: int, offset: int = 0, spare: int = 0) -> Values:
    """Timesteps by the names of arXiv:2305.08891, table 2, and two of ComfyUI's; not rounded.

    train: how many the model was trained with; last: how many of those are used (the noisiest may be cut off).
    spare: how many more steps the spacing is laid out for than are made (DPM-Solver's kind leaves the last one out).
    """
    laid = steps + spare
    if name == "leading":
        return np.asarray((np.arange(laid) * (last // laid))[::-1][:steps] + float(offset))
    if name == "trailing":
        each = train / steps
        times = np.round(last - np.arange(steps) * each) - 1
        return np.asarray(times[times >= 0])  # fewer where the noisiest are cut off
    if name == "simple":
        return np.asarray(last - 1 - np.floor(np.arange(steps) * (last / steps)))
    if name == "sgm_uniform":
        return np.linspace(last - 1, 0, steps + 1)[:-1]
    if laid == 1:
        return np.array([last - 1.0])  # differs from Diffusers: a single step starts from noise, not from t = 0
    return np.linspace(0, last - 1, laid)[::-1][:steps]


def sigmas(name: str, steps: int, low: float, high: float, table: Table) -> Values:
    """Noise levels from ``high`` to ``low`` by name; those of align_your_steps are the table's own down to ``low``."""
    if name not in ALIGNED:
        return SIGMAS[name](steps, low, high)
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


SIGMAS: Mapping[str, Callable[[int, float, float], Values]] = {
    "karras": karras,
    "exponential": polyexponential,
    "beta": beta,
    "kl_optimal": kl_optimal,
    "lu": polyexponential,  # even in log(sigma) too, but told rounded timesteps (arXiv:2211.01095)
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
