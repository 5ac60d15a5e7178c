"""``russet "a prompt"``: from text to PNG files. ``russet batch`` takes the same options."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import russet
from russet.cli.common import (
    DEMO,
    Screen,
    device_option,
    dtype_option,
    height_option,
    model_option,
    open_pipeline,
    width_option,
)
from russet.errors import InputError, OutputError
from russet.schedulers import names

if TYPE_CHECKING:
    from russet.pipelines.output import StableDiffusionPipelineOutput

STEPS, GUIDANCE = 50, 7.5
DEMO_STEPS, DEMO_GUIDANCE = 25, 5.0  # recommended in mini's README
DEMO_NOTE = (
    "mini is the demo model: emoji-like, 256×256. For Stable Diffusion 1.5 (4 GB, once): "
    "--model stable-diffusion-v1-5/stable-diffusion-v1-5"
)
PREVIEW_EVERY = 5  # steps
PNG = ".png"
OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to generate, how, and where to; the fields are the options of ``russet generate``."""

    prompt: str
    negative: str
    model: str
    steps: int | None
    guidance: float | None
    seed: int | None
    width: int | None
    height: int | None
    number: int
    output: Path
    sampler: str | None
    device: str | None
    dtype: str | None
    guidance_interval: tuple[float, float] | None
    deep_cache: int | None
    preview: Path | None
    quiet: bool
    as_json: bool

    def checked(self) -> Job:
        """The job with its defaults and a seed filled in, once everything is checked that needs no model.

        Raises:
            InputError: no sampler has that name, or another image format than PNG is asked for.
            OutputError: no image can be written to ``output`` or ``preview``.
        """
        if self.sampler is not None:
            names.parse(self.sampler)
        check_output(self.output)
        if self.preview is not None:
            if self.preview.suffix.lower() != PNG:
                raise InputError(f"the preview is a PNG file: {self.preview.with_suffix(PNG)} and not {self.preview}")
            check_output(self.preview)
        steps, guidance = (DEMO_STEPS, DEMO_GUIDANCE) if self.model == DEMO else (STEPS, GUIDANCE)
        return replace(
            self,
            steps=steps if self.steps is None else self.steps,
            guidance=guidance if self.guidance is None else self.guidance,
            seed=secrets.randbelow(2**32) if self.seed is None else self.seed,
        )


def check_output(output: Path) -> None:
    """Raises an error where no image can be written, before any work begins."""
    if output.suffix.lower() in OTHER_FORMATS:
        raise InputError(f"images are written as PNG: {output.with_suffix(PNG)} instead of {output}")
    folder = output.parent if output.suffix.lower() == PNG else output
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"no image can be written to {output}: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"no image can be written to {output}: {folder} may not be written to")


OPTIONS = (
    click.option("-n", "--negative", default="", metavar="TEXT", help="What the image should not show."),
    model_option,
    click.option(
        "--steps", type=click.IntRange(min=1), metavar="N", help=f"[default: {STEPS}, with mini {DEMO_STEPS}]"
    ),
    click.option(
        "--guidance",
        type=float,
        metavar="X",
        help=f"How closely to follow the prompt. [default: {GUIDANCE}, with mini {DEMO_GUIDANCE}]",
    ),
    click.option(
        "-s",
        "--seed",
        type=click.IntRange(min=0),
        metavar="N",
        help="The same seed gives the same image. [default: random]",
    ),
    width_option,
    height_option,
    click.option(
        "--number", type=click.IntRange(min=1), metavar="N", default=1, show_default=True, help="How many images."
    ),
    click.option(
        "-o", "--output", type=click.Path(path_type=Path), default=".", help="A folder, or a name that ends in .png."
    ),
    click.option("--sampler", metavar="NAME", help="`russet samplers` lists them. [default: the model's own]"),
    device_option,
    dtype_option,
    click.option(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar="START END",
        help="The part of the noise schedule, 0 to 1, to guide in; half the work elsewhere. [default: everywhere]",
    ),
    click.option(
        "--deep-cache",
        type=click.IntRange(min=1),
        metavar="N",
        help="Compute the whole UNet in every N-th step only, once the layout is there. [default: in all]",
    ),
    click.option(
        "--preview",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write a preview of the image to this PNG file every few steps.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="Print the paths and nothing else."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else."),
)


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a job to a command, in the order of ``OPTIONS``."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.command("generate")
@click.argument("prompt")
@job_options
def command(**options: Any) -> None:
    """Generates images from PROMPT, as PNG files.

    No file is ever overwritten. How an image was made is written into it; `russet inspect FILE` shows it.
    """
    job = Job(**options).checked()
    screen = Screen(quiet=job.quiet or job.as_json)
    with screen.warnings():
        pipe, times = load(job, screen)
        generate(job, pipe, screen, times)


def load(job: Job, screen: Screen) -> tuple[Any, dict[str, float]]:
    """The pipeline on its device, and the seconds that starting Python and loading took."""
    if job.model == DEMO:
        screen.line(DEMO_NOTE)
    import psutil

    import russet.pipelines.stable_diffusion  # noqa: F401  imports torch, which counts as a part of the start

    times = {"start": max(0.0, time.time() - psutil.Process().create_time())}
    began = time.perf_counter()
    pipe = open_pipeline(job.model, dtype=job.dtype, device=job.device, sampler=job.sampler)
    pipe.set_progress_bar_config(**screen.bar("denoise"))
    return pipe, {**times, "load": time.perf_counter() - began}


def generate(job: Job, pipe: Any, screen: Screen, times: Mapping[str, float]) -> None:
    """Generates a job's images, writes them, and prints the paths, or with ``--json`` the report.

    times: the seconds of the phases before.
    """
    if job.deep_cache is None:
        pipe.disable_deep_cache()
    else:
        pipe.enable_deep_cache(job.deep_cache)
    output: StableDiffusionPipelineOutput = pipe(
        job.prompt,
        negative_prompt=job.negative or None,
        num_images_per_prompt=job.number,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance,
        width=job.width,
        height=job.height,
        seed=job.seed,
        guidance_interval=job.guidance_interval,
        **({} if job.preview is None else preview_arguments(job.preview)),
    )
    paths = write_images(job, pipe, output)
    times = {**times, **output.times}
    if job.as_json:
        click.echo(json.dumps(report(job, pipe, output, paths, times), ensure_ascii=False))
        return
    for path in paths:
        click.echo(path)
    for note in output.notes:
        screen.line(f"note: {note}")
    (width, height), seeds = output.images[0].size, ", ".join(map(str, output.seeds or ()))
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in times.items())
    screen.line(f"seed {seeds} · {width}×{height} · {pipe.device}, {dtype_name(pipe)} · {phases}")


def report(
    job: Job, pipe: Any, output: StableDiffusionPipelineOutput, paths: Sequence[Path], times: Mapping[str, float]
) -> dict[str, Any]:
    """What ``--json`` prints."""
    width, height = output.images[0].size
    return {
        "images": [{"path": str(path), "seed": seed} for path, seed in zip(paths, output.seeds or (), strict=True)],
        "prompt": job.prompt,
        "negative_prompt": job.negative,
        "model": job.model,
        "sampler": sampler_name(job, pipe),
        "steps": job.steps,
        "guidance": job.guidance,
        "guidance_interval": job.guidance_interval,
        "deep_cache": job.deep_cache,
        "width": width,
        "height": height,
        "device": str(pipe.device),
        "dtype": dtype_name(pipe),
        "seconds": {phase: round(seconds, 3) for phase, seconds in times.items()},
        "notes": list(output.notes),
    }


def dtype_name(pipe: Any) -> str:
    return str(pipe.dtype).removeprefix("torch.")


def sampler_name(job: Job, pipe: Any) -> str:
    return job.sampler or names.title(pipe.scheduler)


def preview_arguments(file: Path) -> dict[str, Any]:
    """The arguments of a pipeline call that writes previews of all its images to a file."""
    from russet.images.png import save_over, side_by_side

    def show(pipe: Any, index: int, t: Any, tensors: Mapping[str, Any]) -> None:
        if index % PREVIEW_EVERY == 0 or index == pipe.num_timesteps - 1:
            images = pipe.preview(tensors["pred_original_sample"])
            sides = [side * pipe.vae_scale_factor for side in images[0].size]
            save_over(side_by_side([image.resize(sides) for image in images]), file)

    return {"callback_on_step_end": show, "callback_on_step_end_tensor_inputs": ["pred_original_sample"]}


def write_images(job: Job, pipe: Any, output: StableDiffusionPipelineOutput) -> list[Path]:
    """Writes each image, and into it how it was made."""
    from russet.images.png import KEY, Parameters, save_as, save_new

    settings: dict[str, Any] = {"Steps": job.steps, "Sampler": sampler_name(job, pipe), "CFG scale": job.guidance}
    if job.guidance_interval is not None:
        settings["CFG interval"] = "-".join(map(str, job.guidance_interval))
    if job.deep_cache is not None:
        settings["Deep cache"] = job.deep_cache
    paths = []
    for image, seed in zip(output.images, output.seeds or (), strict=True):
        settings |= {"Seed": seed, "Size": f"{image.width}x{image.height}"}
        settings |= {"Model": job.model, "Version": f"Russet {russet.__version__}"}
        made = Parameters(job.prompt, job.negative, {name: str(value) for name, value in settings.items()})
        text = {KEY: made.to_text()}
        if job.output.suffix.lower() == PNG:
            paths.append(save_as(image, job.output, text))
        else:
            paths.append(save_new(image, job.output, "russet", text, tail=f"-seed{seed}"))
    return paths
