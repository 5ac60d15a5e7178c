"""A schedule, which says where the model is evaluated and by which solver, and a passage through it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from russet.errors import InputError
from russet.rng import Noise
from russet.schedulers.noise_levels import Point
from russet.schedulers.solvers import Solver


def unit_variance(x: Tensor, sigma: float | Tensor) -> Tensor:
    """Latents x0 + sigma * eps scaled to unit variance, as the model takes them."""
    return x / (1 + sigma**2) ** 0.5


@dataclass(frozen=True)
class Parameterization:
    """How the public latents and the model's output relate to the solver's x = x0 + sigma * eps, and to x0."""

    variance_preserving: bool  # the public latents are x / sqrt(1 + sigma²), as the model takes them; else they are x
    prediction_type: str  # epsilon, v_prediction or sample
    limit: Callable[[Tensor], Tensor] | None = None  # clips or thresholds a predicted x0
    keep_noise: bool = False  # changes x along with a limited x0, so that the noise is the predicted one

    def from_public(self, x: Tensor, sigma: float) -> Tensor:
        return x * math.sqrt(1 + sigma**2) if self.variance_preserving else x

    def to_public(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return unit_variance(x, sigma) if self.variance_preserving else x

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
        """An image's latents with standard normal noise at a noise level, in the public convention."""
        return self.to_public(x0.float() + sigma * noise.float(), sigma).to(x0.dtype)

    def x0(self, x: Tensor, output: Tensor, sigma: float) -> Tensor:
        """The predicted image x0 of the model's output."""
        if self.prediction_type == "epsilon":
            return torch.sub(x, output, alpha=sigma)
        if self.prediction_type == "v_prediction":  # arXiv:2202.00512, section 4 and appendix D
            return x / (1 + sigma**2) - sigma / math.sqrt(1 + sigma**2) * output
        return output


def thresholded(x0: Tensor, ratio: float, most: float) -> Tensor:
    """Dynamic thresholding (arXiv:2205.11487, section 2.3): each image scaled so that its ``ratio`` quantile fits."""
    ordered = x0.abs().flatten(1).sort(dim=1).values  # not every torch has quantile and lerp on mps
    at = ratio * (ordered.shape[1] - 1)
    low, high = ordered[:, math.floor(at)], ordered[:, math.ceil(at)]
    s = (low + (high - low) * (at - math.floor(at))).clamp(1, most).view(-1, *[1] * (x0.dim() - 1))
    return torch.maximum(torch.minimum(x0, s), -s) / s


@dataclass(frozen=True)
class Schedule:
    """Where the model is evaluated, and by which solver. Immutable: any number of passages may share it."""

    points: tuple[Point, ...]  # where each step starts, noisiest first
    end: Point  # where the last step ends
    solver: Solver
    parameterization: Parameterization
    init_noise_sigma: float  # standard normal noise times this is a start at the first point
    needs_unconditional: bool = False  # ``Passage.send`` needs the output without the prompt too (CFG++)

    @functools.cached_property
    def calls(self) -> tuple[Point, ...]:
        """Where the model is evaluated, call by call, as found by running the solver on plain numbers."""
        zero: Any = 0.0
        steps, found = self.solver(zero, self.points, self.end, cast(Noise, _ZeroNoise())), []
        with contextlib.suppress(StopIteration):
            _, point = next(steps)
            while True:
                found.append(point)
                _, point = steps.send((zero, zero))
        return tuple(found)

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """The index of each step's first call. Heun's method has called the model there before, where its step ends."""
        last = {id(call): number for number, call in enumerate(self.calls)}
        return tuple(last[id(point)] for point in self.points)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timestep of each model call."""
        return tuple(call.t for call in self.calls)

    def start_at(self, step: int) -> Schedule:
        """The schedule from a step on, for image to image."""
        if not 0 <= step < len(self.points):
            raise InputError(f"a schedule of {len(self.points)} steps cannot start at step {step}")
        return dataclasses.replace(self, points=self.points[step:]) if step else self

    def add_noise(self, x0: Tensor, noise: Tensor) -> Tensor:
        """An image's latents with the noise of the first point, as ``run`` takes them; noise: standard normal."""
        return self.parameterization.add_noise(x0, noise, self.points[0].sigma)

    def run(self, x: Tensor, noise: Callable[[], Tensor]) -> Passage:
        """Starts a passage. x: [B, C, h, w] latents at the first point, in the public convention.

        noise: returns standard normal [B, C, h, w], float32, on the device of ``x``; called for each draw.
        """
        return Passage(self, x, noise if isinstance(noise, Noise) else Noise(noise))


class _ZeroNoise:
    def __call__(self) -> float:
        return 0.0

    def path(self, seed: object) -> Callable[[float, float], float]:
        return lambda a, b: 0.0


class Passage:
    """One passage through a schedule: evaluate the model at ``t`` on ``model_input``, ``send`` its output, repeat.

    All arithmetic is in float32; results have the dtype of the latents at the start. Passages share nothing, and
    nothing is read back from the device.

    point, t: where the model is to be evaluated next, and its timestep; None at the end.
    sigma: the noise level of the latents. x0: the last predicted image, None before the first.
    """

    def __init__(self, schedule: Schedule, x: Tensor, noise: Noise):
        if not x.is_floating_point():
            raise InputError(f"latents must be floating-point numbers, not {x.dtype}")
        self.schedule = schedule
        self.dtype = x.dtype
        self.noise = noise
        self.x0: Tensor | None = None
        start = schedule.parameterization.from_public(x.float(), schedule.points[0].sigma)
        self._steps = schedule.solver(start, schedule.points, schedule.end, noise)
        self._advance(*next(self._steps))

    def _advance(self, x: Tensor, point: Point | None) -> None:
        self._x, self.point, self.t = x, point, None if point is None else point.t
        self.sigma = self.schedule.end.sigma if point is None else point.sigma

    @property
    def latents(self) -> Tensor:
        """[B, C, h, w] in the scheduler's public convention. May be set between two calls."""
        return self.schedule.parameterization.to_public(self._x, self.sigma).to(self.dtype)

    @latents.setter
    def latents(self, x: Tensor) -> None:
        self._x = self.schedule.parameterization.from_public(x.float(), self.sigma)

    @property
    def latents_later(self) -> Callable[[], Tensor]:
        """A function that computes ``latents`` as they are now, since most steps need none."""
        x, sigma, parameterization, dtype = self._x, self.sigma, self.schedule.parameterization, self.dtype
        return lambda: parameterization.to_public(x, sigma).to(dtype)

    @property
    def model_input(self) -> Tensor:
        """The latents scaled to unit variance, as the model takes them."""
        return unit_variance(self._x, self.sigma).to(self.dtype)

    def add_noise(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Another image's latents at the current noise level, in the public convention: to blend into ``latents``."""
        return self.schedule.parameterization.add_noise(x0, noise, self.sigma).to(self.dtype)

    def send(self, output: Tensor, unconditional: Tensor | None = None) -> None:
        """Takes the model's output for ``model_input`` and advances to the next call.

        unconditional: the output without the prompt, if ``schedule.needs_unconditional`` (CFG++).
        """
        parameterization, point, x = self.schedule.parameterization, self.point, self._x
        if point is None:
            raise InputError("the schedule has ended: every step of it has been made")
        if (unconditional is not None) != self.schedule.needs_unconditional:
            raise InputError("CFG++ samplers, and only those, take the output without the prompt beside the guided one")
        for given in (output, unconditional):
            if given is not None and given.shape != x.shape:
                raise InputError(f"the model's output is {list(given.shape)}, but the latents are {list(x.shape)}")
        x0 = predicted = parameterization.x0(x, output.float(), point.sigma)
        if parameterization.limit is not None:
            x0 = parameterization.limit(x0)
        if unconditional is not None:
            predicted = parameterization.x0(x, unconditional.float(), point.sigma)
        if unconditional is not None or parameterization.keep_noise:
            x = x + (x0 - predicted)  # so that (x - x0) / sigma stays the predicted noise
        self.x0 = x0.to(self.dtype)
        try:
            self._advance(*self._steps.send((x, x0)))
        except StopIteration as finished:
            self._advance(finished.value, None)
