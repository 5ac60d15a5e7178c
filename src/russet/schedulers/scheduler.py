"""Diffusers' interface of schedulers: ``set_timesteps``, then ``step`` after each model call.

``scheduler.schedule(steps).run(x, noise)`` keeps its state in the passage that it returns, so threads may share one
scheduler. ``set_timesteps`` and ``step`` are the same with the state in the scheduler, for one loop at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from russet import validation
from russet.config import field_types
from russet.errors import InputError, UnsupportedArgument
from russet.rng import Noise, draw
from russet.schedulers.schedule import Passage, Schedule, unit_variance
from russet.schedulers.schedule_builder import ScheduleBuilder

Times = float | Sequence[float] | Tensor


class ScheduleTensor(Tensor):
    """A tensor [N] on the CPU whose elements are copies, for loops that compute ``scheduler.sigmas[i] * latents``.

    An element of an ordinary tensor is a view. Multiplied with a tensor on mps it counts as the first number of its
    storage before torch 2.14 (pytorch#193057).

    Slices and results of operations are ``ScheduleTensor``s too while they are [N] and on the CPU. Everything else is a
    plain tensor, latents among it.
    """

    @classmethod
    def of(cls, x: Tensor) -> Tensor:
        """``x`` [N] as a ``ScheduleTensor``, and anything else as it is; an element as a copy."""
        if type(x) is not Tensor or x.device.type != "cpu" or x.dim() > 1 or x.requires_grad:
            return x
        # as_subclass fails under a dispatch mode of torch 1.13
        return x.clone() if x.dim() == 0 else Tensor._make_subclass(cls, x)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # torch's own way to run a function without this method
        out = torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        if isinstance(out, Tensor):
            return cls.of(out)
        if isinstance(out, (tuple, list)):
            return type(out)([cls.of(x) if isinstance(x, Tensor) else x for x in out])
        return out

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind(0))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = memo.setdefault(id(self), self.detach().clone())
        return copied


class SchedulerOutput(NamedTuple):
    """What ``step`` returns. Both [B, C, h, w], of the dtype of the sample."""

    prev_sample: Tensor  # the latents for the next step
    pred_original_sample: Tensor  # the predicted image


class Scheduler(ScheduleBuilder):
    """A scheduler as Diffusers' programs use it. The attributes and methods have Diffusers' names and meanings.

    timesteps: that of each model call. sigmas: the noise level of each call, and last that of the end.
    betas, alphas_cumprod: [T] float32. All are ``ScheduleTensor``s, except timesteps that were moved to a device.
    init_noise_sigma: the factor that makes standard normal noise a start.
    begin_index, step_index: the indices of the first call and of the next one.
    """

    takes_variance_noise: ClassVar[bool] = False
    noise_in_float32: ClassVar[bool] = False  # as in Diffusers: the steps' noise, whatever the model's precision

    def __init__(self, config: Mapping[str, Any] | None = None, **changes: Any):
        super().__init__(config, **changes)
        self.betas, self.alphas_cumprod = map(ScheduleTensor.of, (self.table.betas, self.table.alphas_cumprod))
        self.timesteps = ScheduleTensor.of(torch.arange(self.config.num_train_timesteps - 1, -1, -1, device="cpu"))
        self.sigmas = ScheduleTensor.of(torch.tensor([*self.table.sigmas[::-1].tolist(), 0.0], device="cpu"))
        self.init_noise_sigma = self.initial_sigma(float(self.table.sigmas[-1]))
        self.num_inference_steps: int | None = None
        self._schedule: Schedule | None = None
        self._reset()

    def _reset(self) -> None:
        self.begin_index: int | None = None
        self.step_index: int | None = None
        self._passage: Passage | None = None
        self._options: dict[str, Any] = {}

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def __repr__(self) -> str:
        steps = "" if self.num_inference_steps is None else f", {self.num_inference_steps} steps"
        kind = self.config.get("prediction_type", "epsilon")
        return f"<{type(self).__name__}: predicts {kind}{steps}>"

    @property
    def compatibles(self) -> list[type[ScheduleBuilder]]:
        """The classes that this one's config can be given to: those on trained noise, or this one alone."""
        trained = "beta_start" in field_types(self.config_class)
        return [cls for cls in self.classes if ("beta_start" in field_types(cls.config_class)) is trained]

    # -- the loop in progress

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        **unknown: Any,
    ) -> None:
        """Makes the schedule of the next loop; see ``schedule``. ``timesteps`` [calls] is moved to the device."""
        validation.refuse_unknown(unknown, {}, f"{type(self).__name__}.set_timesteps()")
        schedule = self._schedule = self.schedule(num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        kind = torch.int64 if self.integer_timesteps else torch.float32
        self.timesteps = ScheduleTensor.of(torch.tensor(schedule.timesteps, dtype=kind, device="cpu").to(device))
        sigmas = [*(call.sigma for call in schedule.calls), schedule.end.sigma]
        self.sigmas = ScheduleTensor.of(torch.tensor(sigmas, device="cpu"))
        self.init_noise_sigma, self.num_inference_steps = schedule.init_noise_sigma, len(schedule.points)
        self._reset()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts the loop at ``timesteps[begin_index]`` (image to image)."""
        begin_index = validation.integer("begin_index", begin_index, least=0)
        self._reset()
        self.begin_index = self.step_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The latents at a timestep as the model takes them."""
        if self.variance_preserving:
            return sample
        schedule, call = self._locate(timestep)
        return unit_variance(sample.float(), schedule.calls[call].sigma).to(sample.dtype)

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
        """Takes the model's output at ``timestep`` and returns the latents for the next one.

        Args:
            model_output, sample: [B, C, h, w].
            timestep: the next of ``timesteps``; the first may be any at which a step starts.
            generator: one for the batch, or one for each image. variance_noise: the noise itself, in its place.
            unconditional: the output without the prompt, which CFG++ needs.
            eta, options: those of the class; the same in each step of a loop.

        Raises:
            InputError: wrong shapes, a timestep out of turn, a step before ``set_timesteps``.
        """
        sample = validation.batch("sample", sample)
        output = validation.batch("model_output", model_output, like=sample)
        noise = self._noise(sample, output.dtype, generator, variance_noise)
        (schedule, call), options = self._locate(timestep), self.read_options(options, eta)
        if self._passage is None:
            solver, parameterization = self.solver(len(schedule.points), **options), self.parameterization(**options)
            schedule = dataclasses.replace(schedule, solver=solver, parameterization=parameterization)
            self._passage, self._options = self.from_call(schedule, call).run(sample, Noise(noise)), options
        elif options != self._options:
            raise InputError(f"the options must be the same in each step: first {self._options}, now {options}")
        passage = self._passage
        passage.noise.draw, passage.latents = noise, sample
        passage.send(output, unconditional)
        self.step_index = call + 1
        if passage.t is None:
            self._passage = None
        assert passage.x0 is not None
        return SchedulerOutput(passage.latents, passage.x0) if return_dict else (passage.latents, passage.x0)

    def _locate(self, timestep: float | Tensor | None) -> tuple[Schedule, int]:
        """The schedule, and the index of the call at a timestep: the next, or at first the first that starts a step."""
        if self._schedule is None:
            raise InputError("call set_timesteps before the first step")
        times, call = self._schedule.timesteps, self.step_index
        t = self._value_of(timestep, times)
        if call is None:
            call = next((start for start in self.starts(self._schedule) if times[start] == t), None)
        if call is None:
            raise InputError(f"no step starts at timestep {t}; the timesteps are {sorted(set(times), reverse=True)}")
        if call >= len(times):
            raise InputError("every step has been made: call set_timesteps to start again")
        if t != times[call]:
            raise InputError(f"step {call} is at timestep {times[call]}, not {t}; call set_timesteps to start again")
        return self._schedule, call

    def _value_of(self, timestep: float | Tensor | None, times: Sequence[float]) -> float:
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            # an element of ``timesteps`` is identified by its address: reading its value would wait for the device
            index = (timestep.data_ptr() - self.timesteps.data_ptr()) // self.timesteps.element_size()
            if 0 <= index < len(times) and timestep.device == self.timesteps.device:
                return times[index]
        return float(np.float32(validation.scalar("a timestep", timestep)))  # the precision of ``timesteps``

    def noise_dtype(self, model: torch.dtype) -> torch.dtype:
        """The precision in which Diffusers draws the steps' noise, for a model of a precision."""
        return torch.float32 if self.noise_in_float32 else model

    def _noise(self, sample: Tensor, model: torch.dtype, generator: Any, given: Tensor | None) -> Callable[[], Tensor]:
        """The source of this step's noise."""
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
        """Latents [B, C, h, w] with the noise of ``timesteps``, one for all or one for each."""
        image = validation.batch("original_samples", original_samples)
        noise = validation.batch("noise", noise, like=image)
        return self.parameterization().add_noise(image, noise, self._sigmas(timesteps, image))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Times) -> Tensor:
        """The correct output of a v_prediction model for ``sample`` [B, C, h, w] with that noise."""
        image, noise = validation.batch("sample", sample), validation.batch("noise", noise, like=sample)
        sigmas = self._sigmas(timesteps, image)
        return unit_variance(noise.float() - sigmas * image.float(), sigmas).to(image.dtype)

    def _sigmas(self, timesteps: Times, like: Tensor) -> Tensor:
        """The noise level of each timestep, [B or 1, 1, 1, 1]."""
        values = torch.as_tensor(timesteps, device=None if isinstance(timesteps, Tensor) else "cpu").flatten().tolist()
        if len(values) not in (1, len(like)):
            raise InputError(f"there are {len(values)} timesteps for a batch of {len(like)}: give one, or one for each")
        sigmas = torch.tensor([self._sigma_of(t) for t in values], device="cpu")
        return sigmas.view(-1, *[1] * (like.dim() - 1)).to(like.device)

    def _sigma_of(self, t: float) -> float:
        """The noise level of a timestep: the current schedule's if it has that timestep, else the table's."""
        if self._schedule is not None:
            calls, call = self._schedule.calls, self.step_index
            following = () if call is None else calls[call : call + 1]
            for point in (*following, *(calls[start] for start in self.starts(self._schedule))):
                if point.t == t:
                    return point.sigma
        validation.timesteps("timesteps", [t], self.table.last)
        return self.table.sigma(t)
