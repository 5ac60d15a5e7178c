"""One call of a pipeline: all of its state, from a checked spec to pictures.

    run = pipe.start(spec)            # checked and planned; nothing is computed yet
    for step in run: ...              # one object a denoising step; ``run.cancel()`` from any thread
    output = run.result()             # the pictures, seeds, times, plan and notes

Nothing of a call is kept on the pipeline or on a network, so any number of runs may be open at a time, in one thread or
in several; a callback may generate with the pipeline that called it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Generator, Tensor
from typing_extensions import Self

from russet.backends.cuda.graphs import Graphs
from russet.errors import InputError
from russet.families.family import Family
from russet.generate import callbacks, decoding, engine
from russet.generate.conditioning import Conditioning
from russet.generate.deep_cache import LEFT_OUT, DeepCache, must_be_whole
from russet.generate.denoiser import build_denoiser
from russet.generate.engine import Predict
from russet.generate.guidance import Guidance
from russet.generate.overflow import fallbacks
from russet.generate.phase_times import Clock
from russet.generate.resolve import COMMON_TENSORS, resolve
from russet.generate.sampling import DenoisingLoop
from russet.generate.spec import Spec
from russet.images.conversion import as_output
from russet.planning.plan import Plan
from russet.residency.form import Precision, dtype_named
from russet.rng import NoiseSource
from russet.schedulers.scheduler import Scheduler

Output = TypeVar("Output")


class OpenNetworks(Protocol):
    """A pipeline's networks keep their form while this is open."""

    def close(self) -> None: ...


class Workplace(Protocol):
    """What a run needs of the pipeline that starts it."""

    scheduler: Scheduler
    graphs: Graphs
    deep_cache: DeepCache | None
    finite_in: torch.dtype | None  # the precision in which the denoiser has made a picture without overflow
    warmed_up: torch.device | None  # where the networks have made their first pass

    @property
    def device(self) -> torch.device: ...

    def known(self, name: str) -> Any:
        """A component, its weights in memory or not; None where it was left out."""

    def plan(
        self, *, height: int, width: int, num_images: int, guidance_scale: float, encodes: bool = False
    ) -> Plan: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def run_open(self) -> OpenNetworks: ...

    def free_copies(self, component: str) -> None:
        """Frees what was copied of a network's weights once its part of the run is done."""

    def on_device(
        self, component: str, plan: Plan, precision: Precision | None = None
    ) -> contextlib.AbstractContextManager[Any]:
        """The network is on its device, in the plan's form or a more precise one, until the block ends."""

    def progress_bar(self, *, total: int) -> Any: ...


@dataclass(frozen=True)
class RunStep:
    """One denoising step that is done: the ``index``-th of ``total``, at timestep ``t``.

    latents: [B, C, h, w], in the scheduler's public convention, computed when they are first looked at.
    x0: the picture's latents [B, C, h, w] as this step predicts them, for previews.
    """

    index: int
    total: int
    t: float
    x0: Tensor = dataclasses.field(repr=False)
    step: engine.Step = dataclasses.field(repr=False)

    @property
    def latents(self) -> Tensor:
        return self.step.latents


_RUNS: ContextVar[tuple[Run[Any], ...]] = ContextVar("russet_runs", default=())
"""The runs whose callbacks are being called, the innermost last."""


def current_run(pipe: object) -> Run[Any] | None:
    """The run of a pipeline whose callback this code is in; None outside of its callbacks."""
    return next((run for run in reversed(_RUNS.get()) if run.pipe is pipe), None)


class Run(Generic[Output]):
    """One call. Iterating makes its steps; ``result`` makes those that are left, and the pictures.

    output: makes the result of images, flags, seeds, seconds by phase, plan and notes.

    Raises:
        InputError, ArgumentTypeError: the spec does not fit the pipeline.
        DoesNotFit: the work needs more memory than the device has.
    """

    def __init__(self, pipe: Workplace, family: Family, spec: Spec, output: Callable[..., Output]) -> None:
        self.pipe, self.family, self.spec = pipe, family, spec
        self.resolved = resolve(spec, family, pipe.scheduler)
        self.plan = pipe.plan(
            height=self.resolved.height,
            width=self.resolved.width,
            num_images=self.resolved.images,
            guidance_scale=self.resolved.guidance.scale,
            **({"encodes": True} if spec.start.encodes else {}),
        )
        cache = pipe.deep_cache
        self._deep_cache = cache and dataclasses.replace(cache, last_timestep=pipe.scheduler.table.last)
        self._scheduler = pipe.scheduler
        self.clock = Clock()
        self.interrupt = False
        self.notes: list[str] = size_notes(self.resolved.width, self.resolved.height, self.plan)
        self.closed = False
        self._cancelled = False
        self._make_output = output
        self._output: Output | None = None
        self._failed = False
        self._networks: OpenNetworks | None = None
        self._loop: DenoisingLoop | None = None
        self._steps: Iterator[RunStep] = self._denoise()

    # -- what the caller may do

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RunStep:
        """Makes one step; the first one encodes the prompts before."""
        try:
            with torch.no_grad():  # around each step and not around a yield, where it would leak to the caller
                return next(self._steps)
        except StopIteration:
            raise
        except BaseException:
            self._failed = True
            self.close()
            raise
        finally:
            self.clock.pause()

    def cancel(self) -> None:
        """Ends the run before its next step, from any thread: ``result`` decodes the latents as they are by then."""
        self._cancelled = True

    @property
    def stopped(self) -> bool:
        """Whether the run was cancelled or interrupted."""
        return self._cancelled or self.interrupt

    def result(self) -> Output:
        """Makes the steps that are left, and the pictures; the same object every time.

        Raises:
            InputError: an error has ended the run before, or it was closed.
        """
        if self._output is None:
            for _ in self:
                pass
            if self._failed or self._loop is None:
                raise InputError("this run has failed or was closed before its end: start another one")
            try:
                with torch.no_grad():
                    self._output = self._finish()
            finally:
                self.clock.pause()
                self.close()
        return self._output

    def close(self) -> None:
        """Gives the networks back; what is left of the run cannot be made any more. ``result`` does it, too."""
        self.closed = True
        self._steps.close()  # type: ignore[attr-defined]
        networks, self._networks = self._networks, None
        if networks is not None:
            networks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_networks", None) is not None:
            self.close()

    # -- what may change between two steps

    @property
    def num_timesteps(self) -> int:
        """Model calls in all."""
        return len(self.resolved.schedule.timesteps)

    @property
    def guidance(self) -> Guidance:
        return self.resolved.guidance if self._loop is None else self._loop.guidance

    @property
    def guidance_scale(self) -> float:
        """May be set between two steps."""
        return self.guidance.scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        if self._loop is not None and scale != self._loop.guidance.scale:
            self._loop.change(self._loop.conditioning, dataclasses.replace(self._loop.guidance, scale=scale))

    @property
    def latents(self) -> Tensor:
        """[B, C, h, w] in the scheduler's public convention. May be set between two steps."""
        assert self._loop is not None, "no step has been made"
        return self._loop.latents

    @latents.setter
    def latents(self, x: Tensor) -> None:
        assert self._loop is not None, "no step has been made"
        self._loop.latents = x

    # -- the phases

    def _denoise(self) -> Iterator[RunStep]:
        """Text, the start, and the steps."""
        self.clock.enter("text")
        self._networks = self.pipe.run_open()
        warm_up = self.plan.warm_up and self.pipe.warmed_up != self.pipe.device
        if warm_up:
            self._encode()  # some torch versions compute a network's first pass otherwise than all later ones
        conditioning = self._encode()
        if self.spec.start.encodes:
            self.clock.enter("encode")
        resolved, device = self.resolved, self.pipe.device
        # A seed's noise is float32; that of the caller's generators has the precision in which Diffusers draws it.
        drawn_in = torch.float32 if resolved.own_streams else self._unet_dtype
        noise = NoiseSource(resolved.generators, resolved.shape, device, drawn_in)
        start = self.spec.start.latents(resolved.schedule, noise, resolved.geometry, self._encode_pictures)
        self.clock.enter("denoise")
        loop = self._loop = self._new_loop(conditioning)
        try:
            if warm_up:
                self._warm_up(conditioning, start)
            noise = dataclasses.replace(noise, dtype=self._scheduler.noise_dtype(drawn_in))
            yield from self._steps_of(loop, noise, start)
        finally:
            loop.close()
        self.pipe.finite_in = self._unet_dtype if loop.finite and not loop.notes else None
        self.notes += loop.notes

    def _steps_of(self, loop: DenoisingLoop, noise: NoiseSource, start: Tensor) -> Iterator[RunStep]:
        with self.pipe.progress_bar(total=loop.total) as bar:
            for step in loop.steps(noise, start, lambda: self.stopped):
                bar.update(step.index + 1 - bar.n)
                if self.spec.callback.function is not None:
                    self._call_back(step)
                self.clock.pause()
                yield RunStep(step.index, loop.total, step.t, step.x0, step)
                self.clock.enter("denoise")

    def _encode(self) -> Conditioning:
        """The conditioning of all images, on the device."""
        resolved = self.resolved
        size = resolved.height, resolved.width
        halves = self.family.encode(resolved.prompts, _TextNetworks(self), size=size, guided=resolved.guided)
        return Conditioning(*halves).to(self.pipe.device).repeated(self.spec.images_per_prompt)

    def _encode_pictures(self, pictures: Tensor, generators: tuple[Generator, ...]) -> Tensor:
        vae, pictures = self.pipe.known("vae"), pictures.to(self.pipe.device)  # a VAE that is streamed rests elsewhere
        latents, notes = decoding.encode(
            vae,
            pictures,
            generators,
            self.plan.vae_batch,
            self._on_device,
            in_float32=self.resolved.own_streams,
        )
        self.notes += notes
        return latents

    def _new_loop(self, conditioning: Conditioning) -> DenoisingLoop:
        return DenoisingLoop(
            self.resolved.schedule,
            conditioning,
            self.resolved.guidance,
            finite_checks=self.plan["finite_checks"],
            fallbacks=fallbacks("unet", self.pipe.known("unet")),
            build=self._build,
            on_device=self._on_device,
            trusted=self.pipe.finite_in == self._unet_dtype,
        )

    @property
    def _unet_dtype(self) -> torch.dtype:
        return dtype_named(self.plan.dtype("unet"))

    def _build(self, conditioning: Conditioning, guidance: Guidance) -> Predict:
        unet, graphs, timesteps = self.pipe.known("unet"), self.pipe.graphs, self.resolved.schedule.timesteps
        cache = self._deep_cache
        if cache is not None and must_be_whole(unet):
            cache = None
            if LEFT_OUT not in self.notes:  # a denoiser may be built several times
                self.notes.append(LEFT_OUT)
        return build_denoiser(unet, conditioning, guidance, self.plan, graphs, cache, timesteps)

    def _on_device(self, component: str, precision: Precision | None = None) -> contextlib.AbstractContextManager[Any]:
        return self.pipe.on_device(component, self.plan, precision)

    def _warm_up(self, conditioning: Conditioning, start: Tensor) -> None:
        """Calls UNet and VAE once and discards what comes of it."""
        with self._on_device("unet"):
            self._build(conditioning, self.resolved.guidance)(start, self.resolved.schedule.timesteps[0])
        vae = self.pipe.known("vae")
        if vae is not None:
            with self._on_device("vae"):
                engine.decode(vae, start[: self.plan.vae_batch], self.plan.vae_batch)
        self.pipe.warmed_up = self.pipe.device

    def _finish(self) -> Output:
        """Decodes the latents, and has the safety checker look at the pictures."""
        assert self._loop is not None
        images: Any = self._loop.latents
        flags = None
        if self.spec.output_type != "latent":
            self.clock.enter("decode")
            self.pipe.free_copies("unet")
            vae, checker, processor = map(self.pipe.known, ("vae", "safety_checker", "feature_extractor"))
            pixels, notes = decoding.decode(vae, images, self.plan.vae_batch, self._on_device)
            pixels, flags = decoding.check(checker, processor, pixels, self.pipe.dtype, self._on_device)
            images = as_output(pixels, self.spec.output_type)
            self.notes += notes
        self.clock.pause()
        return self._make_output(
            images, flags, self.resolved.seeds, dict(self.clock.seconds), self.plan, tuple(self.notes)
        )

    def _call_back(self, step: engine.Step) -> None:
        """Shows the caller the step, and takes what it changed."""
        loop, known, spec = self._loop, self.family.callback_tensors, self.spec.callback
        assert loop is not None
        assert spec.function is not None
        shown = callbacks.shown_tensors(spec.tensors, known, loop.conditioning, step.latents, step.x0)
        runs = _RUNS.set((*_RUNS.get(), self))
        try:
            answer = spec.function(self.pipe, step.index, callbacks.as_tensor(step.t), dict(shown))
        finally:
            _RUNS.reset(runs)
        changed = callbacks.read_answer(answer, shown, (*COMMON_TENSORS, *known))
        if "latents" in changed:
            loop.latents = callbacks.read_latents(changed.pop("latents"), step.latents)
        if changed:
            loop.change(callbacks.reconditioned(loop.conditioning, changed, known), loop.guidance)


class OpenRuns(weakref.WeakSet[Run[Any]]):
    """The runs of a pipeline that somebody holds. A copy of the pipeline, pickled ones too, has none of them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenRuns:
        return OpenRuns()

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenRuns, ()


class _TextNetworks:
    """The text encoders of a run, for its family."""

    def __init__(self, run: Run[Any]) -> None:
        self._run = run

    def on_device(self, component: str) -> contextlib.AbstractContextManager[Any]:
        return self._run._on_device(component)

    @property
    def text_graphs(self) -> Graphs | None:
        plan = self._run.plan
        return self._run.pipe.graphs if plan["cuda_graphs"] and plan.text_encoder == "device" else None


def size_notes(width: int, height: int, plan: Plan) -> list[str]:
    """A note where the device is slow with many pictures of a size."""
    multiple = plan["size_multiple"]
    if height % multiple == 0 and width % multiple == 0:
        return []
    return [
        f"{width}×{height} is no multiple of {multiple} pixels: {plan.why('size_multiple').reason}, so prefer sizes in "
        f"multiples of {multiple} for many pictures"
    ]
