"""Diffusers' protocol around ``Schedule`` and ``Run``: ``set_timesteps``, then ``step`` after each model call.

Two ways in. ``scheduler.schedule(steps).run(x, noise)`` has no state outside the run, so one scheduler may serve any
number of threads. ``set_timesteps`` and ``step`` are the same in Diffusers' form, one run at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from russet.errors import ArgumentTypeError, InputError, UnsupportedArgument
from russet.schedulers import arguments
from russet.schedulers.brownian import Noise, draw
from russet.schedulers.configs import Trained
from russet.schedulers.schedule import Run, Schedule
from russet.schedulers.timetable import Timetable

__all__ = ["Run", "Schedule", "Scheduler", "SchedulerOutput"]


class SchedulerOutput(NamedTuple):
    """What ``step`` returns. Both [B, C, h, w], of the dtype of the sample.

    prev_sample: the latents for the next step. pred_original_sample: the image that the model saw in them.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class Scheduler(Timetable):
    """A scheduler as Diffusers' programs use it. The attributes and methods have Diffusers' names and meanings."""

    takes_variance_noise: ClassVar[bool] = False

    def __init__(self, config: Mapping[str, Any] | None = None, **changes: Any):
        super().__init__(config, **changes)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(self.config.num_train_timesteps - 1, -1, -1)
        self.sigmas = torch.tensor([*self.table.sigmas[::-1].tolist(), 0.0])
        self._plan: Schedule | None = None
        self._told: list[float] = []
        self._forget()

    def _forget(self) -> None:
        self.begin_index: int | None = None
        self.step_index: int | None = None
        self._run: Run | None = None
        self._options: dict[str, Any] = {}

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def betas(self) -> Tensor:
        """[T] float32."""
        return self.table.betas

    @property
    def alphas_cumprod(self) -> Tensor:
        """[T] float32: 1 / (1 + sigma²)."""
        return self.table.alphas_cumprod

    @property
    def compatibles(self) -> list[type[Scheduler]]:
        """The classes that this one's config can be given to."""

        def below(cls: type[Scheduler]) -> list[type[Scheduler]]:
            return [other for child in cls.__subclasses__() for other in (child, *below(child))]

        trained = isinstance(self.config, Trained)
        known = [cls for cls in below(Scheduler) if hasattr(cls, "config_class")]
        return [cls for cls in known if issubclass(cls.config_class, Trained) == trained]

    @property
    def init_noise_sigma(self) -> float:
        """What standard normal noise is multiplied with to start from."""
        if self._plan is not None:
            return self._plan.init_noise_sigma
        return self.initial_sigma(float(self.table.sigmas[-1]))

    # -- the run in progress

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        **unknown: Any,
    ) -> None:
        """Lays out the next run; see ``schedule``. ``timesteps`` [calls] is put on the device."""
        arguments.known(f"{type(self).__name__}.set_timesteps", unknown, {})
        plan = self.schedule(num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        kind = torch.int64 if self.whole else torch.float32  # never float64: mps has none
        told = torch.tensor(plan.timesteps).to(kind)
        self._plan, self._told = plan, told.tolist()
        self.timesteps = told.to(device)
        self.sigmas = torch.tensor([*(call.sigma for call in plan.calls), plan.end.sigma])
        self.num_inference_steps = len(plan.points)
        self._forget()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says that the run begins at ``timesteps[begin_index]`` (image to image)."""
        if isinstance(begin_index, bool) or not isinstance(begin_index, int):
            raise InputError(f"begin_index must be a whole number, not {begin_index!r}")
        self.begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The latents as the model takes them at a timestep."""
        if self.variance_preserving:
            return sample
        sigma = self._set_up().calls[self._call_of(timestep)].sigma
        return (sample.float() / math.sqrt(1 + sigma**2)).to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        generator: Generator | Sequence[Generator] | None = None,
        variance_noise: Tensor | None = None,
        unconditional: Tensor | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Takes the model's output at ``timestep`` and goes on to the next one.

        Args:
            model_output, sample: [B, C, h, w].
            timestep: the next of ``timesteps``; the first may be any that a step begins at.
            generator: one for the batch, or one for each image. variance_noise: the noise itself, in its place.
            unconditional: the output for no prompt, which CFG++ needs.
            options: those of the class, such as ``eta``; the same in each step of a run.

        Raises:
            InputError: wrong shapes, a timestep that was not asked for, a step before ``set_timesteps``.
        """
        sample = arguments.latents("sample", sample)
        output = arguments.latents("model_output", model_output, like=sample)
        source = self._noise_source(sample, generator, variance_noise)
        call = self._call_of(timestep)
        run = self._running(call, sample, source, self.read_options(options))
        run.noise.draw = source
        run.latents = sample
        run.send(output, unconditional)
        assert run.x0 is not None
        self.step_index = call + 1
        if run.t is None:
            self._run = None
        return SchedulerOutput(run.latents, run.x0) if return_dict else (run.latents, run.x0)

    def _set_up(self) -> Schedule:
        if self._plan is None:
            raise InputError("call set_timesteps before the first step")
        return self._plan

    def _running(self, call: int, sample: Tensor, source: Callable[[], Tensor], options: dict[str, Any]) -> Run:
        """The run in progress, or one that begins with this call."""
        if self._run is None:
            plan = self._set_up()
            solver, border = self.solver(len(plan.points), **options), self.border(**options)
            plan = self.from_call(dataclasses.replace(plan, solver=solver, border=border), call)
            self._run, self._options = plan.run(sample, Noise(source)), options
        elif options != self._options:
            raise InputError(f"the options of a run stay the same: it began with {self._options}, now came {options}")
        return self._run

    def _call_of(self, timestep: float | Tensor | None) -> int:
        """Which of the plan's calls a timestep means.

        Raises:
            InputError: it is not the next one, or, at the start of a run, none that a step begins at.
        """
        told, t = self._told, self._value_of(timestep)
        if self.step_index is not None or self.begin_index is not None:
            call = self.step_index if self.step_index is not None else self.begin_index or 0
            if not 0 <= call < len(told):
                raise InputError("every step has been made: call set_timesteps to begin again")
            if t != told[call]:
                raise InputError(f"step {call} is at timestep {told[call]}, not {t}; set_timesteps begins a new run")
            return call
        for call in self.starts(self._set_up()):
            if told[call] == t:
                return call
        raise InputError(f"no step begins at timestep {t}; those of this run are {sorted(set(told), reverse=True)}")

    def _value_of(self, timestep: float | Tensor | None) -> float:
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            # an element of ``timesteps`` is known by where it lies: reading it would make the host wait for the device
            place = (timestep.data_ptr() - self.timesteps.data_ptr()) // self.timesteps.element_size()
            if 0 <= place < len(self._told) and timestep.device == self.timesteps.device:
                return self._told[place]
        number = timestep.numel() == 1 if isinstance(timestep, Tensor) else hasattr(timestep, "__float__")
        if not number or isinstance(timestep, (bool, str)):
            raise ArgumentTypeError(f"a timestep must be one number, not {timestep!r}")
        return float(np.float32(float(timestep)))  # type: ignore[arg-type]  # as exact as ``timesteps`` is

    def _noise_source(self, sample: Tensor, generator: Any, given: Tensor | None) -> Callable[[], Tensor]:
        """Where this step's noise comes from."""
        if given is not None:
            if not self.takes_variance_noise:
                raise UnsupportedArgument(f"{type(self).__name__} does not take variance_noise; give a generator")
            if generator is not None:
                raise InputError("give a generator or variance_noise, not both")
            noise = arguments.latents("variance_noise", given, like=sample).to(sample.device, torch.float32)
            return lambda: noise
        generators = arguments.generators(generator, len(sample))
        return lambda: draw(sample.shape, generators, sample.device)

    # -- noise, for training and for starting in the middle

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: float | Sequence[float] | Tensor) -> Tensor:
        """Latents [B, C, h, w] with the noise of ``timesteps``, one for all or one for each, in the public form."""
        original_samples = arguments.latents("original_samples", original_samples)
        noise = arguments.latents("noise", noise, like=original_samples).float()
        signal, share = self._shares(original_samples, timesteps, self.variance_preserving)
        return (signal * original_samples.float() + share * noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: float | Sequence[float] | Tensor) -> Tensor:
        """What a v_prediction model should answer for ``sample`` [B, C, h, w] with that noise."""
        sample = arguments.latents("sample", sample)
        noise = arguments.latents("noise", noise, like=sample).float()
        signal, share = self._shares(sample, timesteps, variance_preserving=True)
        return (signal * noise - share * sample.float()).to(sample.dtype)

    def _shares(self, like: Tensor, timesteps: Any, variance_preserving: bool) -> tuple[Tensor, Tensor]:
        """How much of the image and of the noise there is at each timestep, [B or 1, 1, 1, 1]."""
        values = torch.as_tensor(timesteps).flatten().tolist()
        if len(values) not in (1, len(like)):
            raise InputError(f"there are {len(values)} timesteps for a batch of {len(like)}: give one, or one for each")
        sigmas = torch.tensor([self._sigma_of(t) for t in values]).view(-1, *[1] * (like.dim() - 1))
        signal = torch.rsqrt(1 + sigmas**2) if variance_preserving else torch.ones_like(sigmas)
        return signal.to(like.device), (signal * sigmas).to(like.device)

    def _sigma_of(self, t: float) -> float:
        """The noise level of a timestep: this run's where it has that timestep, the table's where it has not."""
        if self._plan is not None:
            at = self.step_index if self.step_index is not None else self.begin_index
            if at is not None and at < len(self._told) and self._told[at] == t:
                return self._plan.calls[at].sigma
            for call in self.starts(self._plan):
                if self._told[call] == t:
                    return self._plan.calls[call].sigma
        arguments.inside("timesteps", [t], self.last_timestep())
        return self.table.sigma(t)
