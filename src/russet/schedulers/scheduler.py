"""Diffusers' protocol around ``Schedule`` and ``Run``: ``set_timesteps``, then ``step`` after each model call.

Two ways in. ``scheduler.schedule(steps).run(x, noise)`` has no state outside the run, so one scheduler may serve any
number of threads. ``set_timesteps`` and ``step`` are the same in Diffusers' form, one run at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from russet import validation
from russet.config import field_types
from russet.errors import InputError, UnsupportedArgument
from russet.rng import Noise, draw
from russet.schedulers.schedule import Run, Schedule, of_unit_variance
from russet.schedulers.schedule_builder import Timetable
from russet.schedulers.schedule_tensor import ScheduleTensor

Times = float | Sequence[float] | Tensor


class SchedulerOutput(NamedTuple):
    """What ``step`` returns. Both [B, C, h, w], of the dtype of the sample."""

    prev_sample: Tensor  # the latents for the next step
    pred_original_sample: Tensor  # the image that the model saw in them


class Scheduler(Timetable):
    """A scheduler as Diffusers' programs use it. The attributes and methods have Diffusers' names and meanings.

    timesteps: what the model is told, call by call. sigmas: the noise level of each call, and last that of the end.
    betas, alphas_cumprod: [T] float32. All are ``ScheduleTensor``s, except timesteps that were put on a device.
    init_noise_sigma: what standard normal noise is multiplied with to start from.
    begin_index, step_index: the call that the run begins at, and the one to come.
    """

    takes_variance_noise: ClassVar[bool] = False
    noise_in_float32: ClassVar[bool] = False  # the steps' noise, whatever the model's precision; as Diffusers has it

    def __init__(self, config: Mapping[str, Any] | None = None, **changes: Any):
        super().__init__(config, **changes)
        self.betas, self.alphas_cumprod = map(ScheduleTensor.of, (self.table.betas, self.table.alphas_cumprod))
        self.timesteps = ScheduleTensor.of(torch.arange(self.config.num_train_timesteps - 1, -1, -1, device="cpu"))
        self.sigmas = ScheduleTensor.of(torch.tensor([*self.table.sigmas[::-1].tolist(), 0.0], device="cpu"))
        self.init_noise_sigma = self.initial_sigma(float(self.table.sigmas[-1]))
        self.num_inference_steps: int | None = None
        self._plan: Schedule | None = None
        self._forget()

    def _forget(self) -> None:
        self.begin_index: int | None = None
        self.step_index: int | None = None
        self._run: Run | None = None
        self._options: dict[str, Any] = {}

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def __repr__(self) -> str:
        steps = "" if self.num_inference_steps is None else f", {self.num_inference_steps} steps"
        kind = self.config.get("prediction_type", "epsilon")
        return f"<{type(self).__name__}: predicts {kind}{steps}>"

    @property
    def compatibles(self) -> list[type[Timetable]]:
        """The classes that this one's config can be given to: those on trained noise, or this one alone."""
        trained = "beta_start" in field_types(self.config_class)
        return [cls for cls in self.classes if ("beta_start" in field_types(cls.config_class)) is trained]

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
        validation.refuse_unknown(unknown, {}, f"{type(self).__name__}.set_timesteps()")
        plan = self.schedule(num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        self._plan = plan
        kind = torch.int64 if self.whole else torch.float32
        self.timesteps = ScheduleTensor.of(torch.tensor(plan.timesteps, dtype=kind, device="cpu").to(device))
        sigmas = [*(call.sigma for call in plan.calls), plan.end.sigma]
        self.sigmas = ScheduleTensor.of(torch.tensor(sigmas, device="cpu"))
        self.init_noise_sigma, self.num_inference_steps = plan.init_noise_sigma, len(plan.points)
        self._forget()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says that the run begins at ``timesteps[begin_index]`` (image to image)."""
        begin_index = validation.integer("begin_index", begin_index, least=0)
        self._forget()
        self.begin_index = self.step_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The latents as the model takes them at a timestep."""
        if self.variance_preserving:
            return sample
        plan, call = self._locate(timestep)
        return of_unit_variance(sample.float(), plan.calls[call].sigma).to(sample.dtype)

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
        sample = validation.batch("sample", sample)
        output = validation.batch("model_output", model_output, like=sample)
        noise = self._noise(sample, output.dtype, generator, variance_noise)
        (plan, call), options = self._locate(timestep), self.read_options(options, eta)
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

    def _locate(self, timestep: float | Tensor | None) -> tuple[Schedule, int]:
        """The plan, and the call that a timestep means: the next or, at first, the first that begins a step there."""
        if self._plan is None:
            raise InputError("call set_timesteps before the first step")
        told, call = self._plan.timesteps, self.step_index
        t = self._value_of(timestep, told)
        if call is None:
            call = next((start for start in self.starts(self._plan) if told[start] == t), None)
        if call is None:
            raise InputError(f"no step begins at timestep {t}; those of this run are {sorted(set(told), reverse=True)}")
        if call >= len(told):
            raise InputError("every step has been made: call set_timesteps to begin again")
        if t != told[call]:
            raise InputError(f"step {call} is at timestep {told[call]}, not {t}; set_timesteps begins a new run")
        return self._plan, call

    def _value_of(self, timestep: float | Tensor | None, told: Sequence[float]) -> float:
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            # an element of ``timesteps`` is known by where it lies: reading it would make the host wait for the device
            place = (timestep.data_ptr() - self.timesteps.data_ptr()) // self.timesteps.element_size()
            if 0 <= place < len(told) and timestep.device == self.timesteps.device:
                return told[place]
        return float(np.float32(validation.scalar("a timestep", timestep)))  # as exact as ``timesteps`` is

    def noise_dtype(self, model: torch.dtype) -> torch.dtype:
        """The precision that Diffusers draws the steps' noise in, for a model of a precision."""
        return torch.float32 if self.noise_in_float32 else model

    def _noise(self, sample: Tensor, model: torch.dtype, generator: Any, given: Tensor | None) -> Callable[[], Tensor]:
        """Where this step's noise comes from."""
        if given is None:
            generators = validation.generators(generator, len(sample))
            dtype = self.noise_dtype(model) if generators else torch.float32
            return lambda: draw(sample.shape, generators, sample.device, dtype)
        if not self.takes_variance_noise:
            raise UnsupportedArgument(f"{type(self).__name__} does not take variance_noise; give a generator")
        if generator is not None:
            raise InputError("give a generator or variance_noise, not both")
        noise = validation.batch("variance_noise", given, like=sample).to(sample.device, torch.float32)
        return lambda: noise

    # -- noise, for training and for starting in the middle

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Times) -> Tensor:
        """Latents [B, C, h, w] with the noise of ``timesteps``, one for all or one for each, in the public form."""
        image = validation.batch("original_samples", original_samples)
        noise = validation.batch("noise", noise, like=image)
        return self.border().noisy(image, noise, self._sigmas(timesteps, image))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Times) -> Tensor:
        """What a v_prediction model should answer for ``sample`` [B, C, h, w] with that noise."""
        image, noise = validation.batch("sample", sample), validation.batch("noise", noise, like=sample)
        sigmas = self._sigmas(timesteps, image)
        return of_unit_variance(noise.float() - sigmas * image.float(), sigmas).to(image.dtype)

    def _sigmas(self, timesteps: Times, like: Tensor) -> Tensor:
        """The noise level of each timestep, [B or 1, 1, 1, 1]."""
        values = torch.as_tensor(timesteps, device=None if isinstance(timesteps, Tensor) else "cpu").flatten().tolist()
        if len(values) not in (1, len(like)):
            raise InputError(f"there are {len(values)} timesteps for a batch of {len(like)}: give one, or one for each")
        sigmas = torch.tensor([self._sigma_of(t) for t in values], device="cpu")
        return sigmas.view(-1, *[1] * (like.dim() - 1)).to(like.device)

    def _sigma_of(self, t: float) -> float:
        """The noise level of a timestep: this run's where it has that timestep, the table's where it has not."""
        if self._plan is not None:
            calls, call = self._plan.calls, self.step_index
            coming = () if call is None else calls[call : call + 1]
            for point in (*coming, *(calls[start] for start in self.starts(self._plan))):
                if point.t == t:
                    return point.sigma
        validation.timesteps("timesteps", [t], self.table.last)
        return self.table.sigma(t)
