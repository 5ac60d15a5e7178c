"""Carries a job out: the pipeline, the pictures, the files, and what is said about them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import russet
from russet.cli.job import PNG, Job
from russet.cli.loading import DEMO, open_pipeline
from russet.cli.screen import Screen
from russet.schedulers import names

if TYPE_CHECKING:
    from russet.pipelines.output import StableDiffusionPipelineOutput

DEMO_NOTE = (
    "mini is the demo model: emoji-like, 256×256. For Stable Diffusion 1.5 (4 GB, once): "
    "--model stable-diffusion-v1-5/stable-diffusion-v1-5"
)


PREVIEW_EVERY = 5  # steps


def loaded(job: Job, screen: Screen) -> tuple[Any, dict[str, float]]:
    """The pipeline on its device, and how long the start and the loading took."""
    if job.model == DEMO:
        screen.line(DEMO_NOTE)
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


def draw(job: Job, pipe: Any, screen: Screen, times: Mapping[str, float]) -> None:
    """Draws a job's pictures, writes them, and tells the paths, the seeds and the time of each phase.

    ``times`` are those of the phases that came before. A whole report is JSON; otherwise the paths go to stdout.
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
        **({} if job.preview is None else previewing(job.preview)),
    )
    paths = written(job, pipe, output)
    report = reported(job, pipe, paths, output, {**times, **output.times})
    if job.as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
        return
    for path in paths:
        click.echo(path)
    for note in output.notes:
        screen.line(f"note: {note}")
    seeds = ", ".join(str(image["seed"]) for image in report["images"])
    spent = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in report["seconds"].items())
    screen.line(
        f"seed {seeds} · {report['width']}×{report['height']} · {report['device']}, {report['dtype']} · {spent}"
    )


def previewing(file: Path) -> dict[str, Any]:
    """The arguments of a call that has a file show, every few steps, what the pictures will be."""
    from russet.images.conversion import save_over, side_by_side

    def show(pipe: Any, index: int, t: Any, tensors: Mapping[str, Any]) -> None:
        if index % PREVIEW_EVERY == 0 or index == pipe.num_timesteps - 1:
            pictures = pipe.preview(tensors["pred_original_sample"])
            sides = [side * pipe.vae_scale_factor for side in pictures[0].size]
            save_over(side_by_side([picture.resize(sides) for picture in pictures]), file)

    return {"callback_on_step_end": show, "callback_on_step_end_tensor_inputs": ["pred_original_sample"]}


def written(job: Job, pipe: Any, output: StableDiffusionPipelineOutput) -> list[Path]:
    """Writes each picture, with how it was made inside it."""
    from russet.images.conversion import save_as, save_new
    from russet.images.metadata import KEY

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
    from russet.images.metadata import Parameters

    settings = {
        "Steps": job.steps,
        "Sampler": sampler(job, pipe),
        "CFG scale": job.guidance,
        **less_work(job),
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": job.model,
        "Version": f"Russet {russet.__version__}",
    }
    return Parameters(job.prompt, job.negative, {name: str(value) for name, value in settings.items()}).to_text()


def less_work(job: Job) -> dict[str, Any]:
    """What was left out, where something was."""
    said: dict[str, Any] = {}
    if job.guidance_interval is not None:
        said["CFG interval"] = "-".join(map(str, job.guidance_interval))
    if job.deep_cache is not None:
        said["Deep cache"] = job.deep_cache
    return said


def sampler(job: Job, pipe: Any) -> str:
    return job.sampler or names.title(pipe.scheduler)


def reported(
    job: Job, pipe: Any, paths: Sequence[Path], output: StableDiffusionPipelineOutput, times: Mapping[str, float]
) -> dict[str, Any]:
    """What was drawn, how, where and in what time, as JSON has it."""
    width, height = output.images[0].size
    return {
        "images": [{"path": str(path), "seed": seed} for path, seed in zip(paths, output.seeds or (), strict=True)],
        "prompt": job.prompt,
        "negative_prompt": job.negative,
        "model": job.model,
        "sampler": sampler(job, pipe),
        "steps": job.steps,
        "guidance": job.guidance,
        "guidance_interval": job.guidance_interval,
        "deep_cache": job.deep_cache,
        "width": width,
        "height": height,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "seconds": {phase: round(seconds, 3) for phase, seconds in times.items()},
        "notes": list(output.notes),
    }
