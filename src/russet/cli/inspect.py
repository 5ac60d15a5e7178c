"""``russet inspect``: what a file or folder is, told from its headers and configs; and how a picture was made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from russet.errors import InputError

if TYPE_CHECKING:
    from russet.checkpoints.inspect import Report

SHOWN = 5
"""How many of a list of names are shown to a person; JSON has them all."""


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(path: Path, as_json: bool) -> None:
    """Tells what PATH is, without reading its weights.

    PATH is a checkpoint's file or folder, a LoRA, mini, or a picture that Russet or the web UI made.
    """
    if path.suffix.lower() == ".png":
        inspect_picture(path, as_json)
        return
    from russet.checkpoints.inspect import inspect

    report = inspect(str(path))
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), indent=2, default=str, ensure_ascii=False))
        return
    for line in lines(report):
        click.echo(line)


def lines(report: Report) -> Iterator[str]:
    """A report as a person reads it."""
    from russet.devices.decisions import gigabytes

    kind = " ".join(word for word in (report.kind.family, report.kind.task, report.kind.form) if word)
    yield f"{report.path}: {kind}, {report.kind.layout} layout, {gigabytes(report.size)}"
    for part in report.parts:
        variants = f", variants {', '.join(part.variants)}" if part.variants else ""
        yield f"  {part.name}: {part.parameters / 1e6:.1f} M parameters, {part.precision}{variants}"
    if report.model:
        yield f"  loads as {report.model}"
    if report.predicts:
        yield f"  predicts {report.predicts}"
    if report.lora is not None:
        layers = ", ".join(f"{count} of the {network}" for network, count in report.lora.layers.items())
        yield f"  {report.lora.method} of rank {', '.join(map(str, report.lora.ranks))}, layers: {layers}"
        if report.lora.base:
            yield f"  made for {report.lora.base}"
        yield from named("  not understood", report.lora.unknown or ())
    yield from named("  of no network", report.unused)
    for name, value in report.metadata.items():
        yield f"  {name}: {value[:200]}"


def named(what: str, names: tuple[str, ...]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield f"{what}: {', '.join(names[:SHOWN])}{more}"


def inspect_picture(path: Path, as_json: bool) -> None:
    """Prints how a picture was made, as its ``parameters`` text says.

    Raises:
        InputError: it is no picture, or does not say.
    """
    from PIL import Image

    from russet.metadata import KEY, Parameters

    try:
        with Image.open(path) as image:
            text = image.info.get(KEY)
    except OSError as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from None
    if not isinstance(text, str):
        raise InputError(f"{path} does not say how it was made: it has no {KEY!r} text")
    click.echo(
        json.dumps(dataclasses.asdict(Parameters.of_text(text)), indent=2, ensure_ascii=False) if as_json else text
    )
