"""A pipeline as the options of a command name it, and those options."""

from __future__ import annotations

from typing import Any

import click

from russet.schedulers import names

DEMO = "mini"
SINGLE_FILES = (".safetensors", ".ckpt")
DTYPES = ("float32", "float16", "bfloat16")

model_option = click.option(
    "-m",
    "--model",
    default=DEMO,
    show_default=True,
    help="A Hub repository, a folder, a .safetensors or .ckpt file, or mini.",
)
width_option = click.option(
    "-W", "--width", type=click.IntRange(min=8), metavar="N", help="In pixels. [default: as the model was trained]"
)
height_option = click.option(
    "-H", "--height", type=click.IntRange(min=8), metavar="N", help="In pixels. [default: as the model was trained]"
)
device_option = click.option("--device", metavar="NAME", help="mps, cuda, cuda:1 or cpu. [default: the best one]")
dtype_option = click.option("--dtype", type=click.Choice(DTYPES), help="[default: what suits the device]")


def open_pipeline(model: str, *, dtype: str | None, device: str | None, sampler: str | None = None) -> Any:
    """Loads a model onto a device, by default the best one."""
    from russet import DiffusionPipeline, StableDiffusionPipeline
    from russet.hardware.facts import best_device

    if model.endswith(SINGLE_FILES):
        pipe: Any = StableDiffusionPipeline.from_single_file(model, torch_dtype=dtype)
    else:
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    if sampler is not None:
        pipe.scheduler = names.make(sampler, pipe.scheduler.config)
    return pipe.to(device or best_device())
