"""``russet "a prompt"``: from words to PNG files."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import russet
from russet.cli.loading import (
    DEMO,
    device_option,
    dtype_option,
    height_option,
    model_option,
    open_pipeline,
    width_option,
)
from russet.cli.screen import Screen
from russet.errors import OutputError
from russet.schedulers import names

if TYPE_CHECKING:
    from russet.pipelines.output import StableDiffusionPipelineOutput

DEMO_NOTE = (
    "mini is the demo model: emoji-like, 256×256. For Stable Diffusion 1.5 (4 GB, once): "
    "--model stable-diffusion-v1-5/stable-diffusion-v1-5"
)
STEPS, GUIDANCE = 50, 7.5
DEMO_STEPS, DEMO_GUIDANCE = 25, 5.0  # where mini draws best, says its README
PNG = ".png"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to draw, how, and where to; the fields are the options of ``russet generate``."""

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
    quiet: bool
    as_json: bool

    def settled(self) -> Job:
        """The job with every number that was left open chosen."""
        steps, guidance = (DEMO_STEPS, DEMO_GUIDANCE) if self.model == DEMO else (STEPS, GUIDANCE)
        return replace(
            self,
            steps=steps if self.steps is None else self.steps,
            guidance=guidance if self.guidance is None else self.guidance,
            seed=secrets.randbelow(2**32) if self.seed is None else self.seed,
        )


@click.command("generate")
@click.argument("prompt")
@click.option("-n", "--negative", default="", metavar="TEXT", help="What not to draw.")
@model_option
@click.option("--steps", type=click.IntRange(min=1), help=f"[default: {STEPS}, with mini {DEMO_STEPS}]")
@click.option("--guidance", type=float, help=f"How closely to follow. [default: {GUIDANCE}, with mini {DEMO_GUIDANCE}]")
@click.option("-s", "--seed", type=click.IntRange(min=0), help="The same seed, the same picture. [default: random]")
@width_option
@height_option
@click.option("--number", type=click.IntRange(min=1), default=1, show_default=True, help="How many pictures.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=".", help="A folder, or a name that ends in .png."
)
@click.option("--sampler", metavar="NAME", help="`russet samplers` lists them. [default: the model's own]")
@device_option
@dtype_option
@click.option("-q", "--quiet", is_flag=True, help="Print the paths and nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
def command(**options: Any) -> None:
    """Draws pictures from PROMPT, as PNG files.

    No file is ever overwritten. How a picture was made is written into it; `russet inspect FILE` shows it.
    """
    job = Job(**options).settled()
    check_output(job.output)
    if job.sampler is not None:
        names.parse(job.sampler)  # an unknown name is refused before torch is imported
    screen = Screen(quiet=job.quiet or job.as_json)
    if job.model == DEMO:
        screen.line(DEMO_NOTE)
    with screen.warnings():
        pipe, times = loaded(job, screen)
        output = drawn(pipe, job)
    paths = written(job, pipe, output)
    show(job, pipe, paths, output, {**times, **output.times})


def check_output(output: Path) -> None:
    """Refuses a place where no picture can be written, before any work begins.

    Raises:
        UsageError: another kind of picture than PNG.
        OutputError: a folder that may not be written to.
    """
    if output.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise click.UsageError(f"pictures are written as PNG: {output.with_suffix(PNG)} instead of {output}")
    folder = output.parent if output.suffix.lower() == PNG else output
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"no picture can be written to {output}: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"no picture can be written to {output}: {folder} may not be written to")


def loaded(job: Job, screen: Screen) -> tuple[Any, dict[str, float]]:
    """The pipeline on its device, and how long the start and the loading took."""
    import russet.pipelines.stable_diffusion  # noqa: F401  torch comes with it: its import belongs to the start

    times = {"start": since_process_start()}
    began = time.perf_counter()
    pipe = open_pipeline(job.model, dtype=job.dtype, device=job.device, sampler=job.sampler)
    pipe.set_progress_bar_config(**screen.bar("denoise"))
    return pipe, {**times, "load": time.perf_counter() - began}


def since_process_start() -> float:
    """Seconds since this process began, the start of Python and all imports included."""
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())


def drawn(pipe: Any, job: Job) -> StableDiffusionPipelineOutput:
    output: StableDiffusionPipelineOutput = pipe(
        job.prompt,
        negative_prompt=job.negative or None,
        num_images_per_prompt=job.number,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance,
        width=job.width,
        height=job.height,
        seed=job.seed,
    )
    return output


def written(job: Job, pipe: Any, output: StableDiffusionPipelineOutput) -> list[Path]:
    """Writes each picture, with how it was made inside it."""
    from russet.images import save_as, save_new
    from russet.metadata import KEY

    paths = []
    for image, seed in zip(output.images, output.seeds or (), strict=True):
        text = {KEY: parameters(job, pipe, seed, image.size)}
        if job.output.suffix.lower() == PNG:
            paths.append(save_as(image, job.output, text))
        else:
            paths.append(save_new(image, job.output, "russet", text, tail=f"-seed{seed}"))
    return paths


def parameters(job: Job, pipe: Any, seed: int, size: tuple[int, int]) -> str:
    """How a picture was made, as the text that goes into it."""
    from russet.metadata import Parameters

    settings = {
        "Steps": job.steps,
        "Sampler": job.sampler or names.title(pipe.scheduler),
        "CFG scale": job.guidance,
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": job.model,
        "Version": f"Russet {russet.__version__}",
    }
    return Parameters(job.prompt, job.negative, {name: str(value) for name, value in settings.items()}).to_text()


def show(
    job: Job, pipe: Any, paths: Sequence[Path], output: StableDiffusionPipelineOutput, times: Mapping[str, float]
) -> None:
    """Prints the paths, the seeds and the time of each phase, in words or as JSON."""
    width, height = output.images[0].size
    dtype = str(pipe.dtype).removeprefix("torch.")
    if job.as_json:
        report = {
            "images": [{"path": str(path), "seed": seed} for path, seed in zip(paths, output.seeds or (), strict=True)],
            "model": job.model,
            "prompt": job.prompt,
            "negative_prompt": job.negative,
            "steps": job.steps,
            "guidance": job.guidance,
            "sampler": job.sampler or names.title(pipe.scheduler),
            "width": width,
            "height": height,
            "device": str(pipe.device),
            "dtype": dtype,
            "seconds": {phase: round(seconds, 3) for phase, seconds in times.items()},
            "notes": list(output.notes),
        }
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    for path in paths:
        click.echo(path)
    screen = Screen(quiet=job.quiet)
    for note in output.notes:
        screen.line(f"note: {note}")
    seeds = ", ".join(map(str, output.seeds or ()))
    spent = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in times.items())
    screen.line(f"seed {seeds} · {width}×{height} · {pipe.device}, {dtype} · {spent}")
