"""The exponential integrators' common step: from one noise level to another along a polynomial in log(sigma).

DPM-Solver, DPM-Solver++, UniPC and DEIS solve the linear part of dx/dsigma exactly and put a polynomial through the
model's values at points ``v``, which run with log(sigma) from 0 at a to 1 at b = a e^-h. In the latents
x = x0 + sigma * eps, with weights w_i such that each power v^n is integrated to its moment m_n,

    x = keep x - gain (w_0 value_0 + w_1 value_1 + …) + spread noise
    m_0 = e^z - 1     m_n = n m_(n-1) / z - 1

    value    keep   gain    z       spread                     (two-fold where it is an SDE)
    x0       e^z    1       -h      b sqrt(1 - e^-2h)          z = -2h
    noise    1      b        h      b sqrt(e^2h - 1)           gain = 2b

The published solvers differ in how they round the last moment off: ``KINDS``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from russet.schedulers.brownian import Noise
from russet.schedulers.noise import Point

Moments = list[float]
KINDS: Mapping[str, Callable[[Moments, float], Moments]] = {
    # DPM-Solver's two: the first is steadier under strong guidance, but of the second order with three values too
    "midpoint": lambda m, z: [m[0], m[0] / 2] if len(m) == 2 else [*m[:2], *(last / 2 for last in m[2:])],
    "heun": lambda m, z: m,
    "logrho": lambda m, z: m,  # DEIS
    "bh1": lambda m, z: [m[0], z / 2] if len(m) == 2 else m,  # UniPC, with B(h) = h
    "bh2": lambda m, z: [m[0], m[0] / 2] if len(m) == 2 else m,  # and with B(h) = e^h - 1
}


@dataclass(frozen=True)
class Seen:
    """The image x0 that the model saw in x at a point, and the noise with it."""

    point: Point
    x: Tensor
    x0: Tensor

    @functools.cached_property
    def eps(self) -> Tensor:
        return (self.x - self.x0) / self.point.sigma


@dataclass(frozen=True)
class Exponential:
    """Which of the family's steps is taken.

    kind: one of KINDS. data: the polynomial goes through x0 (DPM-Solver++) or through the noise (DPM-Solver, DEIS).
    sde: follows the stochastic equation, and draws noise.
    """

    kind: str = "midpoint"
    data: bool = True
    sde: bool = False

    def __call__(self, x: Tensor, past: Sequence[Seen], b: Point, noise: Noise) -> Tensor:
        """From past[0], where x is, to b. The polynomial goes through all of ``past``; one of them may be at b."""
        a = past[0].point
        if b.sigma in (0, a.sigma):
            return past[0].x0 if b.sigma == 0 else x
        h, times = math.log(a.sigma / b.sigma), 2 if self.sde else 1
        keep, gain, z = (math.exp(-h * times), 1.0, -h * times) if self.data else (1.0, b.sigma * times, h)
        moments = [math.expm1(z)]
        for n in range(1, len(past)):
            moments.append(n * moments[-1] / z - 1)
        weights = quadrature([math.log(a.sigma / seen.point.sigma) / h for seen in past], KINDS[self.kind](moments, z))
        x = keep * x - gain * weighted(weights, [seen.x0 if self.data else seen.eps for seen in past])
        if not self.sde:
            return x
        spread = math.sqrt(abs(a.sigma**2 - b.sigma**2))
        return x + spread * (b.sigma / a.sigma if self.data else 1.0) * noise()


def weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """The sum of the values, each times its weight."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total


def quadrature(at: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights for values at the places ``at`` that integrate each power 0, 1, … to its moment."""
    weights: list[float] = np.linalg.solve(np.vander(at, increasing=True).T, moments).tolist()
    return weights
