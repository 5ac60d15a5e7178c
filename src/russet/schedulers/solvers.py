"""Solvers that forget: each step needs only the latents it starts from. ``multistep.py`` has those that remember.

A solver is a generator. It yields ``(x, point)``, the latents and the next place where the model is to be evaluated, is
sent ``(x, x0)`` back, the latents (which a caller may have changed) and the model's idea of the image in them, and
returns the latents at the end. Its state is its local variables.

x, x0: [B, C, h, w] float32; x = x0 + sigma * eps, so ``(x - x0) / sigma`` is both the noise and dx/dsigma.
points: where the steps start, noisiest first; end: where the last one goes; noise: what an SDE draws from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from russet.rng import Noise, Seeds
from russet.schedulers.noise_levels import Point

Points = Sequence[Point]
Steps = Generator[tuple[Tensor, Point], tuple[Tensor, Tensor], Tensor]
Solver = Callable[[Tensor, Points, Point, Noise], Steps]  # one of the functions below, its options bound
At = Callable[[float], Point]  # the point of a noise level


def pairs(points: Points, end: Point) -> list[tuple[Point, Point]]:
    """From where to where each step goes."""
    return list(zip(points, [*points[1:], end], strict=True))


def plus(x: Tensor, weight: float, y: Tensor) -> Tensor:
    """``x + weight * y`` in one operation; of plain numbers too, of which a dry run is made."""
    return torch.add(x, y, alpha=weight) if isinstance(x, Tensor) else x + weight * y


def along(x: Tensor, x0: Tensor, a: Point, sigma: float) -> Tensor:
    """Euler's step from a to a noise level: along the straight line through x and x0."""
    return x0 + (x - x0) * (sigma / a.sigma)


def ancestral(a: float, b: float, eta: float) -> tuple[float, float]:
    """(down, up): go from noise level a down to ``down``, add noise of deviation ``up``, and be at b."""
    up = min(b, eta * b * math.sqrt(max(a**2 - b**2, 0.0)) / a)
    return math.sqrt(b**2 - up**2), up


def euler(x: Tensor, points: Points, end: Point, noise: Noise, eta: float = 0.0, large: bool = False) -> Steps:
    """Euler's method (arXiv:2206.00364). On the spacing of DDIM it is DDIM (arXiv:2010.02502) with the same ``eta``;
    with eta = 1 it is Euler ancestral, and DDPM with the posterior's variance.

    large: the variance is beta, the larger of DDPM's two (arXiv:2006.11239, section 3.2), and none in the last step.
    """
    for a, b in pairs(points, end):
        x, x0 = yield x, a
        down, up = ancestral(a.sigma, b.sigma, eta)
        if large:
            up = math.sqrt((a.sigma**2 - b.sigma**2) / (1 + a.sigma**2) * (1 + b.sigma**2)) if b.sigma > 0 else 0.0
        x = along(x, x0, a, down)
        if eta > 0:
            x = x + up * noise()
    return x


def heun(x: Tensor, points: Points, end: Point, noise: Noise, second: bool = True) -> Steps:
    """Heun's method (arXiv:2206.00364, algorithm 1), or Euler's, that adds noise on arrival where the points say so.

    Once in each step that is the churn of that paper's algorithm 2; once or twice in a run, far up, it is Restart
    sampling (arXiv:2306.14878). second: makes a step again with the mean of the slopes at both its ends.
    """
    for a, b in pairs(points, end):
        low = b.arrival or b
        x, x0 = yield x, a
        start, slope = x, (x - x0) / a.sigma
        x = along(x, x0, a, low.sigma)
        if second and low.sigma > 0:
            x, x0 = yield x, low
            x = start + (slope + (x - x0) / low.sigma) / 2 * (low.sigma - a.sigma)
        if low.sigma < b.sigma:
            x = x + math.sqrt(b.sigma**2 - low.sigma**2) * noise()
    return x


def dpm2(x: Tensor, points: Points, end: Point, noise: Noise, at: At, data: bool = False, eta: float = 0.0) -> Steps:
    """DPM-Solver-2 (arXiv:2206.00927): the whole step with the noise that the model sees in its middle.

    data: towards the image that it sees there, which is DPM-Solver++(2S) (arXiv:2211.01095). eta = 1: ancestral.
    """
    for a, b in pairs(points, end):
        x, x0 = yield x, a
        down, up = ancestral(a.sigma, b.sigma, eta)
        if down == 0:
            x = x0
            continue
        start, middle = x, at(math.sqrt(a.sigma * down))
        x, x0 = yield along(x, x0, a, middle.sigma), middle
        x = along(start, x0, a, down) if data else start + (x - x0) / middle.sigma * (down - a.sigma)
        if eta > 0:
            x = x + up * noise()
    return x


def dpmpp_sde(x: Tensor, points: Points, end: Point, noise: Noise, at: At, seed: Seeds = None) -> Steps:
    """DPM-Solver++ (SDE) as k-diffusion has it: 2S with noise in the middle too, both taken from one Brownian path."""
    path = noise.path(seed)
    for a, b in pairs(points, end):
        x, x0 = yield x, a
        if b.sigma == 0:
            x = x0
            continue
        start, middle = x, at(math.sqrt(a.sigma * b.sigma))
        down, up = ancestral(a.sigma, middle.sigma, 1.0)
        x, x0 = yield along(x, x0, a, down) + up * path(a.sigma, middle.sigma), middle
        down, up = ancestral(a.sigma, b.sigma, 1.0)
        x = along(start, x0, a, down) + up * path(a.sigma, b.sigma)
    return x


def lcm(x: Tensor, points: Points, end: Point, noise: Noise, scaling: float = 10.0) -> Steps:
    """Multistep consistency sampling (arXiv:2310.04378): the model's image, with fresh noise for the next step.

    scaling: how fast the share of x in that image falls with t; the model was distilled with it.
    """
    for a, b in pairs(points, end):
        x, x0 = yield x, a
        scaled, data = a.t * scaling, 0.5
        skip, out = data**2 / (scaled**2 + data**2), scaled / math.sqrt(scaled**2 + data**2)
        x = out * x0 + skip / math.sqrt(1 + a.sigma**2) * x
        if b is not end:
            x = x + b.sigma * noise()
    return x


def tcd(x: Tensor, points: Points, end: Point, noise: Noise, lower: Callable[[Point], Point]) -> Steps:
    """Trajectory consistency sampling (arXiv:2402.19159): jump below the next point, then add noise up to it.

    lower: where the jump to a point leads; gamma (``eta`` in Diffusers) is how far below that is.
    """
    for a, b in pairs(points, end):
        x, x0 = yield x, a
        low = lower(b) if b is not end else b
        x = along(x, x0, a, low.sigma)
        if low.sigma < b.sigma:
            x = x + math.sqrt(b.sigma**2 - low.sigma**2) * noise()
    return x
