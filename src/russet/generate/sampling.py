"""The loop around ``engine.denoise``: progress, callbacks, interruption, and latents that stay finite."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from russet import validation
from russet.backends.mps.frames_in_flight import Pace
from russet.errors import ArgumentTypeError, InputError
from russet.generate import engine, overflow
from russet.generate.conditioning import Conditioning
from russet.generate.denoiser import build_denoiser
from russet.generate.spec import CALLBACK_TENSORS, TextToImage
from russet.planning.plan import Plan
from russet.rng import NoiseSource
from russet.schedulers.schedule import Run, Schedule

if TYPE_CHECKING:
    from russet.pipelines.stable_diffusion import StableDiffusionPipeline


class Sampling:
    """One run of a pipeline's denoiser, with everything that may change between two of its steps.

    A callback may replace the latents, the conditioning (one half of it switches guidance off) and, through
    ``pipe._guidance_scale``, the guidance; it may end the run by setting ``pipe.interrupt``.

    ``notes`` says afterwards what went otherwise than planned.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        request: TextToImage,
        schedule: Schedule,
        conditioning: Conditioning,
        plan: Plan,
    ) -> None:
        self.pipe = pipe
        self.schedule = schedule
        self.request = request
        self.conditioning = conditioning
        self.guidance = request.guidance
        self.cache = pipe.deep_cache
        if self.cache is not None:
            self.cache = dataclasses.replace(self.cache, last_timestep=pipe.scheduler.table.last)
        self.plan = plan
        self.notes: list[str] = []
        self.aim()

    def aim(self) -> None:
        """Makes the denoiser anew, for what the conditioning, the guidance or the UNet's arithmetic is by now.

        It may remember its calls, so each passage has one of its own.
        """
        self.predict = build_denoiser(
            self.pipe.known("unet"),
            self.conditioning,
            self.guidance,
            self.plan,
            self.pipe.graphs,
            self.cache,
            self.schedule.timesteps,
        )

    def from_noise(self, noise: NoiseSource, start: Tensor) -> Tensor:
        """Starting noise of deviation 1 → latents at the end of the schedule, or where the run was interrupted.

        Latents that are no longer finite are made again from the last good ones, in more precise arithmetic.
        """
        schedule = self.schedule
        good = self._place(0, start * schedule.init_noise_sigma, noise)
        unet = self.pipe.known("unet")
        remedies = overflow.remedies(self.pipe, "unet", self.plan)
        with self.pipe.progress_bar(total=len(schedule.timesteps)) as bar, remedies as left:
            while True:
                noise.restore(good.noise)
                run = schedule.start_at(good.step).run(good.latents, noise)
                good, finite = self._advance(run, good, noise, bar)
                if finite or not left:
                    break
                self.notes.append(left.pop(0).apply())
                self._back_to(good)
        self.pipe.finite_in = unet.dtype if finite and not self.notes else None
        if not finite:
            self.notes.append("the latents are not finite even in float32: the weights or the inputs must be damaged")
        return run.latents

    def _advance(self, run: Run, good: overflow.Good, noise: NoiseSource, bar: Any) -> tuple[overflow.Good, bool]:
        """Goes on until the end or a value that is not finite; returns the last good place and whether all is well."""
        schedule = self.schedule
        done, checks = len(schedule.timesteps) - len(run.schedule.timesteps), self.plan["finite_checks"]
        trusted = self.pipe.finite_in == self.pipe.known("unet").dtype and not self.notes
        watch, pace = overflow.Watch(good, checks, trusted), Pace(checks == "at the end")
        for step in engine.denoise(run, lambda x, t: self.predict(x, t)):
            pace.step()
            index = done + step.index
            bar.update(index + 1 - bar.n)
            if self.request.callback is not None:
                self._call_back(run, index, step)
            if self.pipe.interrupt:
                break
            if (step.index + 1) % overflow.LOOK_EVERY == 0 and run.point in schedule.points:
                place = self._place(schedule.points.index(run.point), run.latents, noise)
                if not watch.see(place):
                    return watch.good, False
        finite = watch.end(run.latents)
        return watch.good, finite

    def _place(self, step: int, latents: Tensor, noise: NoiseSource) -> overflow.Good:
        """Where the run is now."""
        return overflow.Good(step, latents, noise.state(), self.conditioning, self.guidance)

    def _back_to(self, place: overflow.Good) -> None:
        """Asks the denoiser what it was asked there, and not what a callback has made of it since."""
        self.conditioning, self.guidance = place.conditioning, place.guidance
        self.pipe._guidance_scale = self.guidance.scale
        self.aim()

    def _call_back(self, run: Run, index: int, step: engine.Step) -> None:
        """Shows the caller the step, and takes what it changed."""
        assert self.request.callback is not None
        tensors = {
            "latents": step.latents,
            "prompt_embeds": self.conditioning.joined["encoder_hidden_states"],
            "negative_prompt_embeds": (self.conditioning.negative or {}).get("encoder_hidden_states"),
            "pred_original_sample": step.x0,
        }
        shown = {name: tensors[name] for name in self.request.callback_tensors}
        changed = read_answer(self.request.callback(self.pipe, index, as_tensor(step.t), dict(shown)), shown)
        if "latents" in changed:
            shape = tuple(step.latents.shape)
            run.latents = validation.tensor("latents from callback_on_step_end", changed["latents"], shape).to(
                step.latents
            )
        scale = self.pipe.guidance_scale
        if scale != self.guidance.scale or changed.keys() - {"latents"}:
            self.guidance = dataclasses.replace(self.guidance, scale=scale)
            self.conditioning = reconditioned(self.conditioning, changed)
            self.aim()


def as_tensor(t: float) -> Tensor:
    """A timestep as callbacks know it: a tensor without dimensions, of whole numbers where it is one."""
    return torch.tensor(int(t) if float(t).is_integer() else t, device="cpu")


def read_answer(given: Any, shown: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """What a callback changed: the tensors of its answer that are not the ones it was shown."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ArgumentTypeError(f"callback_on_step_end must return a dict or None, not {validation.shown(given)}")
    for name in given:
        validation.one_of("the names that callback_on_step_end returns", name, CALLBACK_TENSORS)
    changed = {name: tensor for name, tensor in given.items() if tensor is not shown.get(name)}
    if "pred_original_sample" in changed:
        raise InputError("pred_original_sample is for looking at: callback_on_step_end may change latents instead")
    return changed


def reconditioned(before: Conditioning, changed: dict[str, Tensor]) -> Conditioning:
    """The conditioning after a callback. ``prompt_embeds`` has both halves, negative first, or only the positive."""
    positive, negative = (
        None if half is None else half["encoder_hidden_states"] for half in (before.positive, before.negative)
    )
    assert positive is not None
    if (joined := changed.get("prompt_embeds")) is not None:
        images, *rest = positive.shape
        rows = 2 * images if isinstance(joined, Tensor) and len(joined) == 2 * images else images
        validation.tensor("prompt_embeds from callback_on_step_end", joined, (rows, *rest))
        negative, positive = joined.to(positive).chunk(2) if rows == 2 * images else (None, joined.to(positive))
    if (alone := changed.get("negative_prompt_embeds")) is not None:
        validation.tensor("negative_prompt_embeds from callback_on_step_end", alone, tuple(positive.shape))
        negative = alone.to(positive)
    return before.with_halves("encoder_hidden_states", positive, negative)
