"""``russet inspect``: what a file or folder is, by its headers and configs; and how an image was made."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from russet.errors import DoesNotFit, InputError

if TYPE_CHECKING:
    from russet.checkpoints.inspect_report import CheckpointReport

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker")


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--size", metavar="WxH", help="Also predict the memory for an image of this size: 512x512.")
@click.option("--device", metavar="NAME", help="The device for --size. [default: the best one]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(path: Path, size: str | None, device: str | None, as_json: bool) -> None:
    """Shows what PATH is, without reading its weights.

    PATH is a checkpoint's file or folder, a LoRA, mini, or an image that Russet or the web UI made.
    """
    if path.suffix.lower() == ".png":
        inspect_picture(path, as_json)
        return
    from russet.checkpoints.inspect import inspect

    report = inspect(str(path))
    memory = {} if size is None else {"memory": memory_for(report, size, device)}
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(report), **memory}, indent=2, default=str, ensure_ascii=False))
    else:
        click.echo("\n".join([str(report), *(f"  {name + ':':<22}{text}" for name, text in memory.items())]))


def memory_for(report: CheckpointReport, size: str, device: str | None) -> str:
    """The memory that an image of a size takes on a device, in words.

    Raises:
        UsageError: ``size`` is not a size.
        InputError: the report is not about a whole model.
    """
    match = re.fullmatch(r"(\d+)[x×](\d+)", size)
    if match is None:
        raise click.UsageError(f"a size is two numbers of pixels, such as 512x768, not {size!r}")
    if not {"unet", "vae"} <= set(report.configs):
        raise InputError(f"{report.path} holds no whole model, so no memory can be predicted")
    from russet.hardware.facts import gigabytes, read_facts
    from russet.planning.plan import plan
    from russet.planning.workload import Workload

    facts = read_facts(device)
    given: dict[str, Any] = {name: report.configs[name] for name in NETWORKS if name in report.configs}
    try:
        made = plan(facts, Workload.of(**given, width=int(match[1]), height=int(match[2])))
    except DoesNotFit as error:
        return str(error)
    return f"at most {gigabytes(made.peak)} of {gigabytes(facts.memory)} for {size} on {facts.chip} ({facts.device})"


def inspect_picture(path: Path, as_json: bool) -> None:
    """Prints how an image was made, as its ``parameters`` text says.

    Raises:
        InputError: it is no image, or does not say.
    """
    from PIL import Image

    from russet.images.png import KEY, Parameters

    try:
        with Image.open(path) as image:
            text = image.info.get(KEY)
    except OSError as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from None
    if not isinstance(text, str):
        raise InputError(f"{path} does not say how it was made: it has no {KEY!r} text")
    click.echo(
        json.dumps(dataclasses.asdict(Parameters.of_text(text)), indent=2, ensure_ascii=False) if as_json else text
    )
