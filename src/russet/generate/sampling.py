"""The denoising loop of a run: from latents at the start of a schedule to its end, through overflow in between."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from torch import Tensor

from russet.backends.mps.frames_in_flight import FramesInFlight
from russet.generate import engine
from russet.generate.conditioning import Conditioning
from russet.generate.engine import Predict
from russet.generate.guidance import Guidance
from russet.generate.overflow import CHECK_EVERY, Fallback, FiniteMonitor, Snapshot
from russet.residency.form import Precision
from russet.rng import NoiseSource
from russet.schedulers.schedule import Passage, Schedule

Build = Callable[[Conditioning, Guidance], Predict]
BringToDevice = Callable[[str, "Precision | None"], AbstractContextManager[Any]]
"""Has a network on its device, in the run's form or a more precise one, until the block ends."""

DAMAGED = "the latents are not finite even in float32: the weights or the inputs must be damaged"


class DenoisingLoop:
    """The steps of one run, and what may change between two of them: latents, conditioning, guidance.

    build: makes the denoiser; called again when the conditioning, the guidance or the UNet's precision has changed,
    since a denoiser may remember its calls.
    finite_checks: when checks for overflow are read, as the plan says. fallbacks: what is tried once one fails.
    trusted: whether the UNet has made a whole picture in this precision.
    notes: what went otherwise than planned. finite: whether the latents are, once the loop has ended.
    """

    def __init__(
        self,
        schedule: Schedule,
        conditioning: Conditioning,
        guidance: Guidance,
        *,
        finite_checks: str,
        fallbacks: Sequence[Fallback],
        build: Build,
        on_device: BringToDevice,
        trusted: bool,
    ) -> None:
        self.schedule = schedule
        self.total = len(schedule.timesteps)
        self.conditioning, self.guidance = conditioning, guidance
        self.notes: list[str] = []
        self.finite = True
        self.trusted = trusted
        self._finite_checks, self._fallbacks = finite_checks, [*fallbacks]
        self._precision: Precision | None = None
        self._build, self._on_device = build, on_device
        self._denoiser: Predict | None = None
        self._passage: Passage | None = None

    def change(self, conditioning: Conditioning, guidance: Guidance) -> None:
        """Has the next step made with other conditioning or guidance."""
        self.conditioning, self.guidance, self._denoiser = conditioning, guidance, None

    def close(self) -> None:
        """Frees what the denoiser keeps, as the text's keys and values, and lets go of the run: no step follows."""
        self._denoiser, self._build, self._on_device = None, _closed, _closed

    @property
    def latents(self) -> Tensor:
        """[B, C, h, w] in the scheduler's public convention. May be set between two steps."""
        assert self._passage is not None, "the loop has not begun"
        return self._passage.latents

    @latents.setter
    def latents(self, x: Tensor) -> None:
        assert self._passage is not None, "the loop has not begun"
        self._passage.latents = x

    def steps(self, noise: NoiseSource, start: Tensor, stopped: Callable[[], bool]) -> Iterator[engine.Step]:
        """Yields after each model call, until the end or until ``stopped()``. A step that is made again comes again.

        start: latents at the schedule's first point. Values that are not finite have the loop go on from the last
        finite snapshot, with more precise arithmetic.
        """
        snapshot = self._snapshot(0, start, noise)
        while True:
            noise.restore(snapshot.noise)
            passage = self._passage = self.schedule.start_at(snapshot.step).run(snapshot.latents, noise)
            monitor = FiniteMonitor(snapshot, self._finite_checks, self.trusted and not self.notes)
            self.finite = yield from self._until_overflow(passage, monitor, noise, stopped)
            if self.finite or not self._fallbacks:
                break
            fallback, snapshot = self._fallbacks.pop(0), monitor.finite
            self.notes.append(fallback.announce())
            self._precision = fallback.precision
            self.change(snapshot.conditioning, snapshot.guidance)
        if not self.finite:
            self.notes.append(DAMAGED)

    def _until_overflow(
        self, passage: Passage, monitor: FiniteMonitor, noise: NoiseSource, stopped: Callable[[], bool]
    ) -> Generator[engine.Step, None, bool]:
        """The same from a snapshot; returns whether all values were finite."""
        schedule = passage.schedule
        done, first = self.total - len(schedule.timesteps), len(self.schedule.points) - len(schedule.points)
        frames = FramesInFlight(self._finite_checks == "at the end")
        steps = engine.denoise(passage, self._predict, done)
        while not stopped() and (step := next(steps, None)) is not None:
            frames.step()
            yield step
            calls = step.index + 1 - done
            if calls % CHECK_EVERY != 0 or calls not in schedule.starts:
                continue
            if not monitor.check(self._snapshot(first + schedule.starts.index(calls), passage.latents, noise)):
                return False
        return monitor.end(passage.latents)

    def _predict(self, x: Tensor, t: float) -> Tensor:
        with self._on_device("unet", self._precision):
            if self._denoiser is None:
                self._denoiser = self._build(self.conditioning, self.guidance)
            return self._denoiser(x, t)

    def _snapshot(self, step: int, latents: Tensor, noise: NoiseSource) -> Snapshot:
        return Snapshot(step, latents, noise.state(), self.conditioning, self.guidance)


def _closed(*args: object) -> NoReturn:
    raise AssertionError("a loop that was closed makes no more steps")
