"""The exponential integrators' common step: from one noise level to another along a polynomial in log(sigma).

DPM-Solver, DPM-Solver++ and UniPC solve the linear part of dx/dsigma exactly and put a polynomial in
``lambda = -log(sigma)`` through the model's values. In the latents x = x0 + sigma * eps, from a to b = a e^-h, with
D_k the value's k-th derivative by lambda, times h^k,

    x = keep x - gain (c_0(z) D_0 + c_1(z) D_1 + c_2(z) D_2) + spread noise
    c_0 = e^z - 1     c_1 = c_0 / z - 1     c_2 = c_1 / z - 1/2

    value    keep   gain    z       spread                     (two-fold where it is an SDE)
    x0       e^z    1       -h      b sqrt(1 - e^-2h)          z = -2h
    noise    1      b        h      b sqrt(e^2h - 1)           gain = 2b
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from russet.schedulers.brownian import Noise
from russet.schedulers.noise import Point


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

    data: the polynomial goes through x0 (DPM-Solver++) or through the noise (DPM-Solver).
    sde: follows the stochastic equation, and draws noise. bh1: the function B of UniPC, z or e^z - 1.
    exact: coefficients as above ("heun"); else the highest is less, c_0 / 2 or c_2 / 2, and the step the steadier under
    strong guidance ("midpoint"). That lowers an order of 3 to 2.
    """

    data: bool = True
    sde: bool = False
    exact: bool = False
    bh1: bool = False

    def linear(self, a: Point, b: Point) -> tuple[float, float, float, float]:
        """(keep, gain, z, spread) of the step from a to b."""
        h, times = math.log(a.sigma / b.sigma), 2 if self.sde else 1
        spread = math.sqrt(abs(a.sigma**2 - b.sigma**2)) if self.sde else 0.0
        if self.data:
            return math.exp(-h * times), 1.0, -h * times, spread * b.sigma / a.sigma
        return 1.0, b.sigma * times, h, spread

    def values(self, past: Sequence[Seen]) -> list[Tensor]:
        return [seen.x0 if self.data else seen.eps for seen in past]

    def __call__(self, x: Tensor, past: Sequence[Seen], b: Point, noise: Noise) -> Tensor:
        """From past[0], where x is, to b; the polynomial goes through the one to three values of ``past``."""
        a, exact = past[0].point, self.exact
        if b.sigma in (0, a.sigma):
            return past[0].x0 if b.sigma == 0 else x
        keep, gain, z, spread = self.linear(a, b)
        c0 = math.expm1(z)
        c1 = c0 / z - 1 if exact or len(past) == 3 else c0 / 2
        c2 = ((c0 / z - 1) / z - 0.5) * (1.0 if exact else 0.5)
        derivatives = derivatives_at_first(self.values(past), distances(past, b))
        x = keep * x - gain * weighted((c0, c1, c2)[: len(past)], derivatives)
        return x + spread * noise() if self.sde else x

    def unified(self, x: Tensor, past: Sequence[Seen], b: Point) -> Tensor:
        """UniPC's step (arXiv:2302.04867, algorithms 5 and 6): one of ``past`` may be at b itself, which corrects."""
        a, (first, *others) = past[0].point, self.values(past)
        if b.sigma in (0, a.sigma):
            return past[0].x0 if b.sigma == 0 else x
        keep, gain, z, _ = self.linear(a, b)
        x = keep * x - gain * math.expm1(z) * first
        if not others:
            return x
        at, scale = distances(past, b)[1:], z if self.bh1 else math.expm1(z)
        weights = [gain * scale * rho / u for rho, u in zip(uni_weights(at, z, scale), at, strict=True)]
        return x - weighted(weights, [value - first for value in others])


def weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """The sum of the values, each times its weight."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total


def distances(past: Sequence[Seen], b: Point) -> list[float]:
    """Where the points lie in log(sigma): 0 at the first of them, 1 at b."""
    first = past[0].point.sigma
    return [math.log(first / seen.point.sigma) / math.log(first / b.sigma) for seen in past]


def derivatives_at_first(values: Sequence[Tensor], at: Sequence[float]) -> list[Tensor]:
    """The value and the derivatives at the first node of the polynomial through all nodes (divided differences)."""
    if len(values) == 1:
        return [values[0]]
    slope = (values[1] - values[0]) / at[1]
    if len(values) == 2:
        return [values[0], slope]
    bend = ((values[2] - values[0]) / at[2] - slope) / (at[2] - at[1])
    return [values[0], slope - at[1] * bend, 2 * bend]


def quadrature(at: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights for values at the nodes ``at`` that integrate each power 0, 1, … to its moment."""
    weights: list[float] = np.linalg.solve(np.vander(at, increasing=True).T, moments[: len(at)]).tolist()
    return weights


def uni_weights(at: Sequence[float], z: float, scale: float) -> list[float]:
    """UniPC's rho, whose moments are n! z^n phi_(n+1)(z) / scale for n = 1, 2, …; a single one is 1/2."""
    if len(at) == 1:
        return [0.5]
    term, factorial, moments = math.expm1(z) / z - 1, 1, []
    for n in range(1, len(at) + 1):
        moments.append(term * factorial / scale)
        factorial *= n + 1
        term = term / z - 1 / factorial
    return quadrature(at, moments)
