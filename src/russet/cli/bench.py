"""``russet bench``: how fast this machine generates images, and how much memory that takes."""

from __future__ import annotations

import json

import click

from russet.cli.common import (
    Screen,
    device_option,
    dtype_option,
    height_option,
    model_option,
    open_pipeline,
    width_option,
)


@click.command("bench")
@model_option
@click.option(
    "--steps", type=click.IntRange(min=1), metavar="N", default=20, show_default=True, help="Steps for each image."
)
@click.option(
    "--calls",
    type=click.IntRange(min=1),
    metavar="N",
    default=3,
    show_default=True,
    help="Calls to take the median of.",
)
@click.option(
    "--number", type=click.IntRange(min=1), metavar="N", default=1, show_default=True, help="Images in each call."
)
@width_option
@height_option
@device_option
@dtype_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    steps: int,
    calls: int,
    number: int,
    width: int | None,
    height: int | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Measures seconds and memory on this machine.

    Prints a Markdown table of one row, for docs/en/benchmarks.md. Close other programs first.
    """
    from russet.diagnostics.bench import bench, header

    pipe = open_pipeline(model, dtype=dtype, device=device)
    pipe.set_progress_bar_config(**Screen(quiet=as_json).bar("generate"))
    row = bench(pipe, width=width, height=height, images=number, steps=steps, calls=calls)
    click.echo(json.dumps({"model": model, **row.to_dict()}, indent=2) if as_json else f"{header()}\n{row.markdown()}")
