"""Solvers that remember: a step uses what the model said at earlier points. Conventions are those of ``solvers.py``.

Started in the middle, each begins as at the start of a run, with a memory that is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from torch import Tensor

from russet.schedulers.brownian import Noise
from russet.schedulers.exponential import Exponential, weighted
from russet.schedulers.noise import Point
from russet.schedulers.solvers import Steps, pairs

# Adams-Bashforth weights, newest first, for one to four slopes at even distances
ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(x: Tensor, points: Sequence[Point], end: Point, noise: Noise, warm_up: bool = True) -> Steps:
    """PNDM without its Runge-Kutta steps (arXiv:2202.09778): Adams-Bashforth on the noise, of the fourth order.

    warm_up: makes the first step twice, the second time with the mean of the slopes at both ends. Without it this is
    the improved PNDM of arXiv:2204.13902.
    """
    slopes: list[Tensor] = []
    for i, (a, b) in enumerate(pairs(points, end)):
        x, x0 = yield x, a
        slopes = [(x - x0) / a.sigma, *slopes][:4]
        start = x
        if i == 0:  # no difference of two large numbers, where a.sigma is in the thousands
            x = x0 + slopes[0] * b.sigma
        else:
            x = x + weighted(ADAMS[len(slopes) - 1], slopes) * (b.sigma - a.sigma)
        if warm_up and i == 0 and len(points) > 1:
            x, x0 = yield x, b
            x = start + (slopes[0] + (x - x0) / b.sigma) / 2 * (b.sigma - a.sigma)
    return x


def prk(x: Tensor, points: Sequence[Point], end: Point, noise: Noise, middle: Callable[[Point, Point], Point]) -> Steps:
    """PNDM as published (arXiv:2202.09778): three steps of Runge-Kutta's fourth-order method, then Adams-Bashforth."""
    slopes: list[Tensor] = []
    for a, b in pairs(points, end):
        x, x0 = yield x, a
        slopes = [(x - x0) / a.sigma, *slopes][:4]
        if len(slopes) == 4 or b is end:
            x = x + weighted(ADAMS[len(slopes) - 1], slopes) * (b.sigma - a.sigma)
            continue
        start, stages, half = x, slopes[:1], middle(a, b)
        for stop in (half, half, b):
            x, x0 = yield start + stages[-1] * (stop.sigma - a.sigma), stop
            stages.append((x - x0) / stop.sigma)
        x = start + weighted((1 / 6, 1 / 3, 1 / 3, 1 / 6), stages) * (b.sigma - a.sigma)
    return x


def lms(x: Tensor, points: Sequence[Point], end: Point, noise: Noise, order: int = 4) -> Steps:
    """Linear multistep: the slopes' polynomial in sigma, integrated exactly (Adams-Bashforth at uneven distances)."""
    slopes: list[Tensor] = []
    past: list[float] = []
    for a, b in pairs(points, end):
        x, x0 = yield x, a
        slopes, past = [(x - x0) / a.sigma, *slopes][:order], [a.sigma, *past][:order]
        integrals = [basis.integ() for basis in lagrange(past)]
        x = x + weighted([float(f(b.sigma) - f(a.sigma)) for f in integrals], slopes)
    return x


def deis(x: Tensor, points: Sequence[Point], end: Point, noise: Noise, order: int = 2, tail: int = 0) -> Steps:
    """DEIS, log-rho form (arXiv:2204.13902): the slopes' polynomial in log(sigma), integrated over sigma.

    tail: how many of the last steps use no higher an order than there are steps left.
    """
    slopes: list[Tensor] = []
    past: list[float] = []
    for left, (a, b) in zip(range(len(points), 0, -1), pairs(points, end), strict=True):
        x, x0 = yield x, a
        slopes, past = [(x - x0) / a.sigma, *slopes][:order], [float(np.log(a.sigma)), *past][:order]
        k = 1 if b.sigma == 0 else min(len(past), left if left <= tail else order)
        # the integral of P(log s) ds is s (P - P' + P'') at log s
        integrals = [p - p.deriv() + p.deriv(2) for p in lagrange(past[:k])]
        low = float(np.log(b.sigma)) if k > 1 else 0.0
        x = x + weighted([float(b.sigma * f(low) - a.sigma * f(past[0])) for f in integrals], slopes[:k])
    return x


def lagrange(nodes: Sequence[float]) -> list[np.poly1d]:
    """The polynomials that are 1 at one node and 0 at the others."""
    others = [[v for k, v in enumerate(nodes) if k != j] for j in range(len(nodes))]
    return [
        np.poly1d(rest, r=True) / float(np.prod([u - v for v in rest])) for u, rest in zip(nodes, others, strict=True)
    ]


def dpm_multistep(
    x: Tensor, points: Sequence[Point], end: Point, noise: Noise, method: Exponential, order: int = 2, tail: int = 0
) -> Steps:
    """DPM-Solver and DPM-Solver++, 2M and 3M, and their SDE forms (arXiv:2211.01095)."""
    values: list[Tensor] = []
    past: list[Point] = []
    for left, (a, b) in zip(range(len(points), 0, -1), pairs(points, end), strict=True):
        x, x0 = yield x, a
        values, past = [method.value(x, x0, a), *values][:order], [a, *past][:order]
        k = min(len(past), left if left <= tail else order)
        x = method.step(x, values[:k], past[:k], b, noise) if b.sigma > 0 else x0
    return x


def unipc(
    x: Tensor,
    points: Sequence[Point],
    end: Point,
    noise: Noise,
    method: Exponential,
    order: int = 2,
    tail: int = 0,
    uncorrected: Collection[int] = (),
) -> Steps:
    """UniPC (arXiv:2302.04867): a predictor, and a corrector that uses the model's value where the prediction led.

    uncorrected: the steps whose result is left as predicted, each by how many steps were left when it began.
    """
    values: list[Tensor] = []
    past: list[Point] = []
    start, predicted, k = x, x, 0
    for i, (a, b) in enumerate(pairs(points, end)):
        x, x0 = yield x, a
        value = method.value(x, x0, a)
        left = len(points) - i
        if i > 0 and left + 1 not in uncorrected:  # as a difference, so that a caller's change to x is kept
            x = x + (method.unified(start, [*values[:k], value], [*past[:k], a], a) - predicted)
        values, past = [value, *values][:order], [a, *past][:order]
        k = min(len(past), left if left <= tail else order)
        start, x = x, method.unified(x, values[:k], past[:k], b) if b.sigma > 0 else x0
        predicted = x
    return x
