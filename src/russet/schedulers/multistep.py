"""Solvers that remember: a step uses what the model said at earlier points. Conventions are those of ``solvers.py``.

Started in the middle, each begins as at the start of a run, with a memory that is empty.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from russet.rng import Noise
from russet.schedulers.noise_levels import Point
from russet.schedulers.solvers import Points, Steps, pairs, plus


@dataclass(frozen=True)
class Seen:
    """The image x0 that the model saw in x at a point, and the noise with it."""

    point: Point
    x: Tensor
    x0: Tensor

    @functools.cached_property
    def eps(self) -> Tensor:
        return (self.x - self.x0) / self.point.sigma


Rule = Callable[[Tensor, Sequence[Seen], Point, Noise], Tensor]
"""A step from x at past[0] to a point, by what was seen there and elsewhere, newest first."""
Start = Callable[[Seen, Point], Steps]
"""A step by a method of its own, from a point where the model has been asked to another one."""


def multistep(
    x: Tensor,
    points: Points,
    end: Point,
    noise: Noise,
    rule: Rule,
    order: int,
    tail: int = 0,
    corrected: Collection[int] = (),
) -> Steps:
    """Each step by a rule, from up to ``order`` of the latest points.

    The rule ``adams`` makes it LMS or the improved PNDM, and an ``Exponential`` DPM-Solver's 2M and 3M or DEIS, which
    in its log-rho form (arXiv:2204.13902) is DPM-Solver with the noise's polynomial integrated exactly. Corrections
    make it UniPC (arXiv:2302.04867).

    tail: how many of the last steps use no higher an order than there are steps left. corrected: the steps, each by how
    many were left when it began, that are made again with what the model says where they led.
    """
    past, used, start, predicted = list[Seen](), list[Seen](), x, x
    for i, (a, b) in enumerate(pairs(points, end)):
        x, x0 = yield x, a
        seen, left = Seen(a, x, x0), len(points) - i
        if used and left + 1 in corrected:  # as a difference, so that a caller's change to x is kept
            x = x + (rule(start, [*used, seen], a, noise) - predicted)
        past = [seen, *past][:order]
        used = past[: left if left <= tail else order]
        start, x = x, rule(x, used, b, noise)
        predicted = x
    return x


def gathered(x: Tensor, scale: float, weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """x, and to it the values, each times its weight and ``scale``: one operation for each of them."""
    for weight, value in zip(weights, values, strict=True):
        x = plus(x, scale * weight, value)
    return x


@functools.lru_cache(maxsize=256)  # a run solves each twice, and the next run the same ones
def quadrature(at: tuple[float, ...], moments: tuple[float, ...]) -> list[float]:
    """Weights for values at the places ``at`` that integrate each power 0, 1, … to its moment."""
    weights: list[float] = np.linalg.solve(np.vander(at, increasing=True).T, moments).tolist()
    return weights


def adams(x: Tensor, past: Sequence[Seen], b: Point, noise: Noise, even: bool = False) -> Tensor:
    """Linear multistep (Adams and Bashforth's): the noise's polynomial in sigma, integrated exactly.

    even: as if the distances were even, which is the improved PNDM of arXiv:2204.13902.
    """
    a = past[0].point.sigma
    if len(past) == 1:  # no difference of two large numbers, where sigma is in the thousands
        return past[0].x0 + past[0].eps * b.sigma
    at = [-n if even else (seen.point.sigma - a) / (b.sigma - a) for n, seen in enumerate(past)]
    weights = quadrature(tuple(at), tuple(1 / n for n in range(1, len(past) + 1)))
    return gathered(x, b.sigma - a, weights, [seen.eps for seen in past])


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
class Exponential:
    """The step of the exponential integrators, along a polynomial in log(sigma).

    DPM-Solver, DPM-Solver++, UniPC and DEIS solve the linear part of dx/dsigma exactly and put a polynomial through the
    model's values at points ``v``, which run with log(sigma) from 0 at a to 1 at b = a e^-h. In the latents
    x = x0 + sigma * eps, with weights w_i such that each power v^n is integrated to its moment m_n,

        x = keep x - gain (w_0 value_0 + w_1 value_1 + …) + spread noise
        m_0 = e^z - 1     m_n = n m_(n-1) / z - 1

        value    keep   gain    z       spread                     (two-fold where it is an SDE)
        x0       e^z    1       -h      b sqrt(1 - e^-2h)          z = -2h
        noise    1      b        h      b sqrt(e^2h - 1)           gain = 2b

    kind: one of KINDS, which say what the published solvers make of the last moment. data: the values are x0
    (DPM-Solver++) or the noise (DPM-Solver, DEIS). sde: follows the stochastic equation, and draws noise.
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
        at = tuple(math.log(a.sigma / seen.point.sigma) / h for seen in past)
        weights = quadrature(at, tuple(KINDS[self.kind](moments, z)))
        x = gathered(keep * x, -gain, weights, [seen.x0 if self.data else seen.eps for seen in past])
        if not self.sde:
            return x
        spread = math.sqrt(abs(a.sigma**2 - b.sigma**2))
        return x + spread * (b.sigma / a.sigma if self.data else 1.0) * noise()


def singlestep(
    x: Tensor, points: Points, end: Point, noise: Noise, method: Exponential, orders: Sequence[int]
) -> Steps:
    """DPM-Solver and DPM-Solver++ in groups of one to three points that start afresh (arXiv:2206.00927).

    orders: one number for each point; a group is 1, 2, 3, and each of its steps starts where the group does.
    """
    start, past = x, list[Seen]()
    for order, (a, b) in zip(orders[-len(points) :], pairs(points, end), strict=True):
        x, x0 = yield x, a
        if order == 1 or not past:
            start, past = x, []
        past = [*past, Seen(a, x, x0)]
        if b.sigma == 0:
            x = x0
        elif len(past) == 3 and method.kind == "midpoint":  # whose third order leaves the middle value out
            x = dataclasses.replace(method, kind="heun")(start, past[::2], b, noise)
        else:
            x = method(start, past, b, noise)
    return x


def pndm(x: Tensor, points: Points, end: Point, noise: Noise, start: Start, starts: int) -> Steps:
    """PNDM (arXiv:2202.09778): the first ``starts`` steps by ``start``, the others by Adams-Bashforth, fourth order."""
    past: list[Seen] = []
    for i, (a, b) in enumerate(pairs(points, end)):
        x, x0 = yield x, a
        past = [Seen(a, x, x0), *past][:4]
        x = (yield from start(past[0], b)) if i < starts and b is not end else adams(x, past, b, noise, even=True)
    return x


def heun_start(seen: Seen, b: Point) -> Steps:
    """Heun's method; PNDM started with one such step is PLMS."""
    x, x0 = yield seen.x0 + seen.eps * b.sigma, b
    return seen.x + (seen.eps + (x - x0) / b.sigma) / 2 * (b.sigma - seen.point.sigma)


def runge_kutta_start(seen: Seen, b: Point, middle: Callable[[Point, Point], Point]) -> Steps:
    """Runge and Kutta's method of the fourth order; PNDM starts with three such steps."""
    a, slopes = seen.point, [seen.eps]
    half = middle(a, b)
    for stop in (half, half, b):
        x, x0 = yield seen.x + slopes[-1] * (stop.sigma - a.sigma), stop
        slopes.append((x - x0) / stop.sigma)
    return gathered(seen.x, b.sigma - a.sigma, (1 / 6, 1 / 3, 1 / 3, 1 / 6), slopes)
