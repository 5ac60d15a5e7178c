"""``russet "a prompt"``: from words to PNG files."""

from __future__ import annotations

from typing import Any

import click

from russet.cli.job import Job, job_options
from russet.cli.pictures import draw, loaded
from russet.cli.screen import Screen


@click.command("generate")
@click.argument("prompt")
@job_options
def command(**options: Any) -> None:
    """Draws pictures from PROMPT, as PNG files.

    No file is ever overwritten. How a picture was made is written into it; `russet inspect FILE` shows it.
    """
    job = Job(**options).settled()
    screen = Screen(quiet=job.quiet or job.as_json)
    with screen.warnings():
        pipe, times = loaded(job, screen)
        draw(job, pipe, screen, times)
