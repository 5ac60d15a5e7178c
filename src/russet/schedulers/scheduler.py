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

from russet import arguments
from russet.config import field_types
from russet.errors import ArgumentTypeError, InputError, UnsupportedArgument
from russet.random_streams import Noise, draw
from russet.schedulers.schedule import Run, Schedule
from russet.schedulers.timetable import Timetable

__all__ = ["Run", "Schedule", "Scheduler", "SchedulerOutput"]
Times = float | Sequence[float] | Tensor


class SchedulerOutput(NamedTuple):
    """What ``step`` returns. Both [B, C, h, w], of the dtype of the sample.

    prev_sample: the latents for the next step. pred_original_sample: the image that the model saw in them.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class Scheduler(Timetable):
    """A scheduler as Diffusers' programs use it. The attributes and methods have Diffusers' names and meanings.

    timesteps: what the model is told, call by call. sigmas: the noise level of each call, and last that of the end.
    betas, alphas_cumprod: [T] float32. init_noise_sigma: what standard normal noise is multiplied with to start from.
    begin_index, step_index: the call that the run begins at, and the one to come.
    """

    takes_variance_noise: ClassVar[bool] = False

    def __init__(self, config: Mapping[str, Any] | None = None, **changes: Any):
        super().__init__(config, **changes)
        self.betas, self.alphas_cumprod = self.table.betas, self.table.alphas_cumprod
        self.timesteps = torch.arange(self.config.num_train_timesteps - 1, -1, -1)
        self.sigmas = torch.tensor([*self.table.sigmas[::-1].tolist(), 0.0])
        self.init_noise_sigma = self.initial_sigma(float(self.table.sigmas[-1]))
        self.num_inference_steps: int | None = None
        self._plan: Schedule | None = None
        self._told: list[float] = []  # the timesteps, as numbers of the host
        self._starts: dict[float, int] = {}  # the first call at each timestep that a step begins at
        self._forget()

    def _forget(self) -> None:
        self.begin_index: int | None = None
        self.step_index: int | None = None
        self._run: Run | None = None
        self._options: dict[str, Any] = {}

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def compatibles(self) -> list[type[Scheduler]]:
        """The classes that this one's config can be given to: those on trained noise, or this one alone."""

        def below(cls: type[Scheduler]) -> list[type[Scheduler]]:
            return [other for child in cls.__subclasses__() for other in (child, *below(child))]

        def trained(cls: type[Scheduler]) -> bool:
            return "beta_start" in field_types(cls.config_class)

        known = [cls for cls in below(Scheduler) if hasattr(cls, "config_class")]
        return [cls for cls in known if trained(cls) == trained(type(self))]

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
        arguments.refuse_unknown(unknown, {}, f"{type(self).__name__}.set_timesteps()")
        plan = self.schedule(num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        told = torch.tensor(plan.timesteps).to(torch.int64 if self.whole else torch.float32)  # mps has no float64
        self._plan, self._told = plan, told.tolist()
        self._starts = {self._told[call]: call for call in reversed(self.starts(plan))}
        self.timesteps = told.to(device)
        self.sigmas = torch.tensor([*(call.sigma for call in plan.calls), plan.end.sigma])
        self.init_noise_sigma, self.num_inference_steps = plan.init_noise_sigma, len(plan.points)
        self._forget()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says that the run begins at ``timesteps[begin_index]`` (image to image)."""
        self.begin_index = arguments.integer("begin_index", begin_index, least=0)

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
        eta: float | None = None,
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
            eta, options: those of the class; the same in each step of a run.

        Raises:
            InputError: wrong shapes, a timestep that was not asked for, a step before ``set_timesteps``.
        """
        sample = arguments.batch("sample", sample)
        output = arguments.batch("model_output", model_output, like=sample)
        noise = self._noise(sample, generator, variance_noise)
        plan, call, options = self._set_up(), self._call_of(timestep), self.read_options(options, eta)
        if self._run is None:
            solver, border = self.solver(len(plan.points), **options), self.border(**options)
            plan = self.from_call(dataclasses.replace(plan, solver=solver, border=border), call)
            self._run, self._options = plan.run(sample, Noise(noise)), options
        elif options != self._options:
            raise InputError(f"the options of a run stay the same: it began with {self._options}, now came {options}")
        run = self._run
        run.noise.draw, run.latents = noise, sample
        run.send(output, unconditional)
        self.step_index = call + 1
        if run.t is None:
            self._run = None
        assert run.x0 is not None
        return SchedulerOutput(run.latents, run.x0) if return_dict else (run.latents, run.x0)

    def _set_up(self) -> Schedule:
        if self._plan is None:
            raise InputError("call set_timesteps before the first step")
        return self._plan

    def _next(self) -> int | None:
        """The call to come, where that is decided."""
        return self.step_index if self.step_index is not None else self.begin_index

    def _call_of(self, timestep: float | Tensor | None) -> int:
        """The call that a timestep means: the next or, at the start of a run, the first that begins a step there."""
        told, t = self._told, self._value_of(timestep)
        call = self._next()
        if call is None and t not in self._starts:
            raise InputError(f"no step begins at timestep {t}; those of this run are {sorted(set(told), reverse=True)}")
        if call is None:
            return self._starts[t]
        if call >= len(told):
            raise InputError("every step has been made: call set_timesteps to begin again")
        if t != told[call]:
            raise InputError(f"step {call} is at timestep {told[call]}, not {t}; set_timesteps begins a new run")
        return call

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

    def _noise(self, sample: Tensor, generator: Any, given: Tensor | None) -> Callable[[], Tensor]:
        """Where this step's noise comes from."""
        if given is None:
            generators = arguments.generators(generator, len(sample))
            return lambda: draw(sample.shape, generators, sample.device)
        if not self.takes_variance_noise:
            raise UnsupportedArgument(f"{type(self).__name__} does not take variance_noise; give a generator")
        if generator is not None:
            raise InputError("give a generator or variance_noise, not both")
        noise = arguments.batch("variance_noise", given, like=sample).to(sample.device, torch.float32)
        return lambda: noise

    # -- noise, for training and for starting in the middle

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Times) -> Tensor:
        """Latents [B, C, h, w] with the noise of ``timesteps``, one for all or one for each, in the public form."""
        image = arguments.batch("original_samples", original_samples)
        noise = arguments.batch("noise", noise, like=image)
        signal, share = self._shares(image, timesteps, self.variance_preserving)
        return (signal * image.float() + share * noise.float()).to(image.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Times) -> Tensor:
        """What a v_prediction model should answer for ``sample`` [B, C, h, w] with that noise."""
        image, noise = arguments.batch("sample", sample), arguments.batch("noise", noise, like=sample)
        signal, share = self._shares(image, timesteps, variance_preserving=True)
        return (signal * noise.float() - share * image.float()).to(image.dtype)

    def _shares(self, like: Tensor, timesteps: Times, variance_preserving: bool) -> tuple[Tensor, Tensor]:
        """How much of the image and of the noise there is at each timestep, [B or 1, 1, 1, 1]."""
        values = torch.as_tensor(timesteps).flatten().tolist()
        if len(values) not in (1, len(like)):
            raise InputError(f"there are {len(values)} timesteps for a batch of {len(like)}: give one, or one for each")
        sigmas = torch.tensor([self._sigma_of(t) for t in values]).view(-1, *[1] * (like.dim() - 1))
        signal = torch.rsqrt(1 + sigmas**2) if variance_preserving else torch.ones_like(sigmas)
        return signal.to(like.device), (signal * sigmas).to(like.device)

    def _sigma_of(self, t: float) -> float:
        """The noise level of a timestep: this run's where it has that timestep, the table's where it has not."""
        call = self._next()
        if call is None or call >= len(self._told) or self._told[call] != t:
            call = self._starts.get(t)
        if self._plan is not None and call is not None:
            return self._plan.calls[call].sigma
        self.check_inside("timesteps", [t])
        return self.table.sigma(t)
