"""Solvers that remember: a step uses what the model said at earlier points. Conventions are those of ``solvers.py``.

Started in the middle, each begins as at the start of a run, with a memory that is empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from russet.schedulers.brownian import Noise
from russet.schedulers.exponential import Exponential, distances, quadrature, weighted
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
        length = b.sigma - a.sigma
        weights = quadrature([(sigma - a.sigma) / length for sigma in past], [1 / n for n in range(1, order + 1)])
        x = x + length * weighted(weights, slopes)
    return x


def deis(x: Tensor, points: Sequence[Point], end: Point, noise: Noise, order: int = 2, tail: int = 0) -> Steps:
    """DEIS, log-rho form (arXiv:2204.13902): the slopes' polynomial in log(sigma), integrated over sigma.

    tail: how many of the last steps use no higher an order than there are steps left.
    """
    slopes: list[Tensor] = []
    past: list[Point] = []
    for left, (a, b) in zip(range(len(points), 0, -1), pairs(points, end), strict=True):
        x, x0 = yield x, a
        slopes, past = [(x - x0) / a.sigma, *slopes][:order], [a, *past][:order]
        k = min(len(past), left if left <= tail else order)
        if k == 1 or b.sigma in (0, a.sigma):
            x = x0 + slopes[0] * b.sigma
            continue
        z = math.log(b.sigma / a.sigma)
        moments = [math.expm1(z)]  # of v**n over e^(z v) z dv, v = 0 .. 1, where sigma is a e^(z v)
        for n in range(1, k):
            moments.append(math.exp(z) - n / z * moments[-1])
        x = x + a.sigma * weighted(quadrature(distances(past[:k], b), moments), slopes[:k])
    return x


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


def dpm_singlestep(
    x: Tensor, points: Sequence[Point], end: Point, noise: Noise, method: Exponential, orders: Sequence[int]
) -> Steps:
    """DPM-Solver and DPM-Solver++ in groups of one to three points that start afresh (arXiv:2206.00927).

    orders: one number for each point; a group is 1, 2, 3, and each of its steps starts where the group does.
    """
    start, values, past = x, list[Tensor](), list[Point]()
    for order, (a, b) in zip(orders[-len(points) :], pairs(points, end), strict=True):
        x, x0 = yield x, a
        if order == 1 or not past:
            start, values, past = x, [], []
        values, past = [*values, method.value(x, x0, a)], [*past, a]
        if len(values) == 3 and not method.exact:  # the third order of "midpoint" leaves the middle value out
            x = method.step(start, values[::2], past[::2], b, noise, exact=True) if b.sigma > 0 else x0
        else:
            x = method.step(start, values, past, b, noise) if b.sigma > 0 else x0
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
