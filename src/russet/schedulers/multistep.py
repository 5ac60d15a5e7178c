"""Solvers that remember: a step uses what the model said at earlier points. Conventions are those of ``solvers.py``.

Started in the middle, each begins as at the start of a run, with a memory that is empty.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence

from torch import Tensor

from russet.schedulers.brownian import Noise
from russet.schedulers.exponential import Exponential, Seen, distances, quadrature, weighted
from russet.schedulers.noise import Point
from russet.schedulers.solvers import Steps, pairs

Rule = Callable[[Tensor, Sequence[Seen], Point, Noise], Tensor]
"""A step from x at past[0] to a point, by what was seen there and before, newest first."""
Start = Callable[[Seen, Point], Steps]
"""A step by a method of its own, from a point where the model has been asked to another one."""


def countdown(points: Sequence[Point], end: Point) -> Iterator[tuple[int, Point, Point]]:
    """How many steps are left, this one among them, and from where to where it goes."""
    return ((len(points) - i, a, b) for i, (a, b) in enumerate(pairs(points, end)))


def multistep(
    x: Tensor, points: Sequence[Point], end: Point, noise: Noise, rule: Rule, order: int, tail: int = 0
) -> Steps:
    """Each step by a rule, from up to ``order`` of the latest points: LMS, iPNDM, DEIS, DPM-Solver's 2M and 3M.

    tail: how many of the last steps use no higher an order than there are steps left.
    """
    past: list[Seen] = []
    for left, a, b in countdown(points, end):
        x, x0 = yield x, a
        past = [Seen(a, x, x0), *past][:order]
        x = rule(x, past[: left if left <= tail else order], b, noise)
    return x


# Adams-Bashforth weights, newest first, for one to four slopes at even distances
ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def adams(x: Tensor, past: Sequence[Seen], b: Point, noise: Noise) -> Tensor:
    """The improved PNDM of arXiv:2204.13902: Adams-Bashforth on the noise as if the distances were even."""
    if len(past) == 1:  # no difference of two large numbers, where sigma is in the thousands
        return past[0].x0 + past[0].eps * b.sigma
    return x + weighted(ADAMS[len(past) - 1], [seen.eps for seen in past]) * (b.sigma - past[0].point.sigma)


def lms(x: Tensor, past: Sequence[Seen], b: Point, noise: Noise) -> Tensor:
    """Linear multistep: the noise's polynomial in sigma, integrated exactly (Adams-Bashforth at uneven distances)."""
    a = past[0].point.sigma
    at = [(seen.point.sigma - a) / (b.sigma - a) for seen in past]
    weights = quadrature(at, [1 / n for n in range(1, len(past) + 1)])
    return x + (b.sigma - a) * weighted(weights, [seen.eps for seen in past])


def deis(x: Tensor, past: Sequence[Seen], b: Point, noise: Noise) -> Tensor:
    """DEIS, log-rho form (arXiv:2204.13902): the noise's polynomial in log(sigma), integrated over sigma."""
    a = past[0].point.sigma
    if len(past) == 1 or b.sigma in (0, a):
        return past[0].x0 + past[0].eps * b.sigma
    z = math.log(b.sigma / a)
    moments = [math.expm1(z)]  # of v**n over e^(z v) z dv, v = 0 .. 1, where sigma is a e^(z v)
    for n in range(1, len(past)):
        moments.append(math.exp(z) - n / z * moments[-1])
    return x + a * weighted(quadrature(distances(past, b), moments), [seen.eps for seen in past])


def pndm(x: Tensor, points: Sequence[Point], end: Point, noise: Noise, start: Start, starts: int) -> Steps:
    """PNDM (arXiv:2202.09778): the first ``starts`` steps by ``start``, the others by Adams-Bashforth, fourth order."""
    past: list[Seen] = []
    for i, (a, b) in enumerate(pairs(points, end)):
        x, x0 = yield x, a
        past = [Seen(a, x, x0), *past][:4]
        x = (yield from start(past[0], b)) if i < starts and b is not end else adams(x, past, b, noise)
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
    return seen.x + weighted((1 / 6, 1 / 3, 1 / 3, 1 / 6), slopes) * (b.sigma - a.sigma)


def singlestep(
    x: Tensor, points: Sequence[Point], end: Point, noise: Noise, method: Exponential, orders: Sequence[int]
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
        elif len(past) == 3 and not method.exact:  # the third order of "midpoint" leaves the middle value out
            x = dataclasses.replace(method, exact=True)(start, past[::2], b, noise)
        else:
            x = method(start, past, b, noise)
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
    past, used, start, predicted = list[Seen](), list[Seen](), x, x
    for left, a, b in countdown(points, end):
        x, x0 = yield x, a
        seen = Seen(a, x, x0)
        if used and left + 1 not in uncorrected:  # as a difference, so that a caller's change to x is kept
            x = x + (method.unified(start, [*used, seen], a) - predicted)
        past = [seen, *past][:order]
        used = past[: left if left <= tail else order]
        start, x = x, method.unified(x, used, b)
        predicted = x
    return x
