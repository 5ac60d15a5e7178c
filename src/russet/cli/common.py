"""What the commands share: the options that name a model and a device, loading it, and output on stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
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


class Screen(logging.Handler):
    """Lines, warnings and a progress bar on stderr, as stdout is for results; nothing at all when quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(logging.WARNING)
        self.quiet = quiet

    def line(self, text: str) -> None:
        """Prints a line above the progress bar, where there is one."""
        if self.quiet:
            return
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
        else:
            click.echo(text, err=True)

    def bar(self, what: str) -> dict[str, Any]:
        """The options of a pipeline's progress bar, which is shown in terminals only and vanishes when it is full."""
        return {"desc": what, "leave": False, "disable": self.quiet or not sys.stderr.isatty()}

    def emit(self, record: logging.LogRecord) -> None:
        self.line(f"{record.levelname.lower()}: {record.getMessage()}")

    @contextlib.contextmanager
    def warnings(self) -> Iterator[None]:
        """Prints the library's warnings as lines."""
        logger = logging.getLogger("russet")
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
