"""``russet samplers``: the names that ``--sampler`` takes."""

from __future__ import annotations

import click

from russet.schedulers import names


@click.command("samplers")
def command() -> None:
    """Lists the samplers, and the schedules to go with them."""
    width = max(map(len, names.SAMPLERS))
    for name, row in names.SAMPLERS.items():
        click.echo(f"{name:{width}}  {row.title}")
    click.echo(f"\nEach may be followed by a schedule, as in dpmpp_2m_karras: {', '.join(names.list_schedules())}")
