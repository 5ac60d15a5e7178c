"""What a person asks for with ``russet "a prompt"``: the options, and the numbers that stand where they say nothing."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from russet.cli.loading import DEMO, device_option, dtype_option, height_option, model_option, width_option
from russet.errors import InputError, OutputError
from russet.schedulers import names

STEPS, GUIDANCE = 50, 7.5
DEMO_STEPS, DEMO_GUIDANCE = 25, 5.0  # where mini draws best, says its README
PNG = ".png"
OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


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
    guidance_interval: tuple[float, float] | None
    deep_cache: int | None
    preview: Path | None
    quiet: bool
    as_json: bool

    def settled(self) -> Job:
        """The job with every number that was left open chosen, and all checked that can be checked at once.

        Raises:
            InputError: no sampler has that name, or another kind of picture than PNG is asked for.
            OutputError: no picture can be written where it is to go.
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
    """Refuses a place where no picture can be written, before any work begins."""
    if output.suffix.lower() in OTHER_PICTURES:
        raise InputError(f"pictures are written as PNG: {output.with_suffix(PNG)} instead of {output}")
    folder = output.parent if output.suffix.lower() == PNG else output
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"no picture can be written to {output}: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"no picture can be written to {output}: {folder} may not be written to")


OPTIONS = (
    click.option("-n", "--negative", default="", metavar="TEXT", help="What not to draw."),
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
        help="The same seed, the same picture. [default: random]",
    ),
    width_option,
    height_option,
    click.option(
        "--number", type=click.IntRange(min=1), metavar="N", default=1, show_default=True, help="How many pictures."
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
        help="While drawing, show in this PNG file every few steps what it will be.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="Print the paths and nothing else."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else."),
)


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the options of a job, in the order of ``OPTIONS``."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
