"""A schedule, which is where the steps are, and a run, which is one passage through it."""

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
from russet.schedulers.noise import Point
from russet.schedulers.solvers import Solver


def of_unit_variance(x: Tensor, sigma: float | Tensor) -> Tensor:
    """Latents x0 + sigma * eps as the model takes them."""
    return x / (1 + sigma**2) ** 0.5


@dataclass(frozen=True)
class Border:
    """Between the solver's latents, x = x0 + sigma * eps, and what is outside: the public latents and the model."""

    variance_preserving: bool  # the public latents are x / sqrt(1 + sigma²), as the model sees them; else they are x
    prediction_type: str  # epsilon, v_prediction or sample
    limited: Callable[[Tensor], Tensor] | None = None  # what is done to a predicted x0: clipping or thresholding
    keeps_noise: bool = False  # the limit moves x along with x0, so that the noise the model saw is kept

    def inward(self, x: Tensor, sigma: float) -> Tensor:
        return x * math.sqrt(1 + sigma**2) if self.variance_preserving else x

    def outward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return of_unit_variance(x, sigma) if self.variance_preserving else x

    def noisy(self, x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
        """An image's latents with standard normal noise at a noise level, in the public convention."""
        return self.outward(x0.float() + sigma * noise.float(), sigma).to(x0.dtype)

    def x0(self, x: Tensor, output: Tensor, sigma: float) -> Tensor:
        """The image that the model's output stands for."""
        if self.prediction_type == "epsilon":
            return torch.sub(x, output, alpha=sigma)
        if self.prediction_type == "v_prediction":  # arXiv:2202.00512, section 4 and appendix D
            return x / (1 + sigma**2) - sigma / math.sqrt(1 + sigma**2) * output
        return output


def thresholded(x0: Tensor, ratio: float, most: float) -> Tensor:
    """Dynamic thresholding (arXiv:2205.11487, section 2.3): each image scaled so that its ``ratio`` quantile fits."""
    ordered = x0.abs().flatten(1).sort(dim=1).values  # not every torch has quantile and lerp on mps
    place = ratio * (ordered.shape[1] - 1)
    low, high = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
    s = (low + (high - low) * (place - math.floor(place))).clamp(1, most).view(-1, *[1] * (x0.dim() - 1))
    return torch.maximum(torch.minimum(x0, s), -s) / s


@dataclass(frozen=True)
class Schedule:
    """Where the model will be evaluated, and by which solver. Immutable: any number of runs may share it."""

    points: tuple[Point, ...]  # where each step starts, noisiest first
    end: Point  # where the last one goes
    solver: Solver
    border: Border
    init_noise_sigma: float  # what standard normal noise is multiplied with to start from the first point
    needs_unconditional: bool = False  # ``Run.send`` must be told the output without the prompt too

    @functools.cached_property
    def calls(self) -> tuple[Point, ...]:
        """Where the model is evaluated, call by call: a dry run of the solver on plain numbers."""
        zero: Any = 0.0
        steps, found = self.solver(zero, self.points, self.end, cast(Noise, _Silent())), []
        with contextlib.suppress(StopIteration):
            _, point = next(steps)
            while True:
                found.append(point)
                _, point = steps.send((zero, zero))
        return tuple(found)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the model is told, call by call."""
        return tuple(call.t for call in self.calls)

    def start_at(self, step: int) -> Schedule:
        """The rest of the schedule from a step on (image to image): as good as a whole one, with fewer steps."""
        if not 0 <= step < len(self.points):
            raise InputError(f"a run of {len(self.points)} steps cannot begin at step {step}")
        return dataclasses.replace(self, points=self.points[step:]) if step else self

    def add_noise(self, x0: Tensor, noise: Tensor) -> Tensor:
        """An image's latents with the noise of the first point, as ``run`` takes them; noise: standard normal."""
        return self.border.noisy(x0, noise, self.points[0].sigma)

    def run(self, x: Tensor, noise: Callable[[], Tensor]) -> Run:
        """Begins a run. x: [B, C, h, w] latents at the first point, in the public convention.

        noise: gives standard normal [B, C, h, w], float32, on the device of ``x``; called once for each draw.
        """
        return Run(self, x, noise if isinstance(noise, Noise) else Noise(noise))


class _Silent:
    def __call__(self) -> float:
        return 0.0

    def path(self, seed: object) -> Callable[[float, float], float]:
        return lambda a, b: 0.0


class Run:
    """One passage through a schedule: evaluate the model at ``t`` on ``model_input``, ``send`` its output, repeat.

    All arithmetic is in float32; what goes out has the dtype of the latents that came in. Nothing is shared with other
    runs, and nothing is read back from the device.

    point: where the model is to be evaluated next, and t, what it is told there; None when the run is over.
    sigma: the noise level of the latents as they are. x0: the last predicted image, None before the first.
    """

    def __init__(self, schedule: Schedule, x: Tensor, noise: Noise):
        if not x.is_floating_point():
            raise InputError(f"latents must be floating-point numbers, not {x.dtype}")
        self.schedule = schedule
        self.dtype = x.dtype
        self.noise = noise
        self.x0: Tensor | None = None
        start = schedule.border.inward(x.float(), schedule.points[0].sigma)
        self._steps = schedule.solver(start, schedule.points, schedule.end, noise)
        self._arrive(*next(self._steps))

    def _arrive(self, x: Tensor, point: Point | None) -> None:
        self._x, self.point, self.t = x, point, None if point is None else point.t
        self.sigma = self.schedule.end.sigma if point is None else point.sigma

    @property
    def latents(self) -> Tensor:
        """[B, C, h, w] in the scheduler's public convention. May be set between two calls."""
        return self.schedule.border.outward(self._x, self.sigma).to(self.dtype)

    @latents.setter
    def latents(self, x: Tensor) -> None:
        self._x = self.schedule.border.inward(x.float(), self.sigma)

    @property
    def latents_later(self) -> Callable[[], Tensor]:
        """Gives ``latents`` as they are now whenever it is called: in most steps nobody looks at them."""
        x, sigma, border, dtype = self._x, self.sigma, self.schedule.border, self.dtype
        return lambda: border.outward(x, sigma).to(dtype)

    @property
    def model_input(self) -> Tensor:
        """The latents as the model takes them, of unit variance."""
        return of_unit_variance(self._x, self.sigma).to(self.dtype)

    def add_noise(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Another image's latents at the present noise level, in the public convention: to blend into ``latents``."""
        return self.schedule.border.noisy(x0, noise, self.sigma).to(self.dtype)

    def send(self, output: Tensor, unconditional: Tensor | None = None) -> None:
        """Takes the model's output for ``model_input`` and goes on to the next call.

        unconditional: the output for no prompt, where ``schedule.needs_unconditional`` says so (CFG++).
        """
        border, point, x = self.schedule.border, self.point, self._x
        if point is None:
            raise InputError("the run is over: every step of its schedule has been made")
        if (unconditional is not None) != self.schedule.needs_unconditional:
            raise InputError("CFG++ samplers, and only those, take the output without the prompt beside the guided one")
        for given in (output, unconditional):
            if given is not None and given.shape != x.shape:
                raise InputError(f"the model's output is {list(given.shape)}, but the latents are {list(x.shape)}")
        x0 = seen = border.x0(x, output.float(), point.sigma)
        if border.limited is not None:
            x0 = border.limited(x0)
        if unconditional is not None:
            seen = border.x0(x, unconditional.float(), point.sigma)
        if unconditional is not None or border.keeps_noise:
            x = x + (x0 - seen)  # so that (x - x0) / sigma is the noise that was seen
        self.x0 = x0.to(self.dtype)
        try:
            self._arrive(*self._steps.send((x, x0)))
        except StopIteration as finished:
            self._arrive(finished.value, None)
