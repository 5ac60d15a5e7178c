"""``russet batch FILE``: many prompts with one model, loaded once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from russet.cli.job import Job, job_options
from russet.cli.pictures import draw, loaded
from russet.cli.screen import Screen
from russet.errors import DoesNotFit, InputError, RussetError
from russet.file_io import parse_json, read_text

KEYS = {
    "prompt": "a text",
    "negative": "a text",
    "steps": "a whole number",
    "guidance": "a number",
    "seed": "a whole number",
    "width": "a whole number",
    "height": "a whole number",
    "number": "a whole number",
    "output": "a text",
}
"""What a JSON line may say; each stands for the option of that name."""

TYPES: dict[str, tuple[type, ...]] = {"a text": (str,), "a whole number": (int,), "a number": (int, float)}
FAILED = 1


@click.command("batch")
@click.argument("file")
@job_options
def command(file: str, **options: Any) -> int:
    """Draws every prompt of FILE, with one model.

    FILE has a prompt on each line, or a JSON object with the key prompt and any of negative, steps, guidance, seed,
    width, height, number and output; `-` is stdin. What a line leaves out, the options say. All lines are read before
    the first is drawn; one that cannot be drawn is reported, and the others go on. With --json each report is a line.
    """
    text = sys.stdin.read() if file == "-" else read_text(Path(file))
    jobs = list(read_jobs(text.splitlines(), Job(prompt="", **options), file))
    if not jobs:
        raise InputError(f"{file} holds no prompt")
    screen = Screen(quiet=options["quiet"] or options["as_json"])
    code = 0
    with screen.warnings():
        pipe, times = loaded(jobs[0], screen)
        for count, job in enumerate(jobs, start=1):
            screen.line(f"{count} of {len(jobs)}: {job.prompt}")
            try:
                draw(job, pipe, screen, times)
            except (InputError, DoesNotFit) as error:
                click.echo(f"russet: {job.prompt!r} was not drawn: {error}", err=True)
                code = FAILED
            times = {}  # the start and the loading belong to the first
    return code


def read_jobs(lines: Iterable[str], pattern: Job, where: str) -> Iterator[Job]:
    """The job of each line that is not empty; ``pattern`` holds what a line leaves out.

    Raises:
        InputError: a line is no prompt and no object with the right keys; the error names it.
    """
    for number, line in enumerate(lines, start=1):
        if not (text := line.strip()):
            continue
        said: dict[str, Any] = (
            {"prompt": text} if not text.startswith("{") else read_object(text, f"{where}, line {number}")
        )
        if "output" in said:
            said["output"] = Path(said["output"])
        try:
            yield replace(pattern, **said).settled()
        except RussetError as error:
            raise InputError(f"{where}, line {number}: {error}") from None


def read_object(text: str, where: str) -> dict[str, Any]:
    """A JSON line, its keys and the types of its values checked."""
    try:
        said = parse_json(text, where)
    except RussetError as error:
        raise InputError(str(error)) from None
    if unknown := [key for key in said if key not in KEYS]:
        raise InputError(f"{where}: no key is called {', '.join(unknown)}; there are {', '.join(KEYS)}")
    for key, value in said.items():
        if not isinstance(value, TYPES[KEYS[key]]) or isinstance(value, bool):
            raise InputError(f"{where}: {key} must be {KEYS[key]}, not {json.dumps(value)}")
    if "prompt" not in said:
        raise InputError(f"{where}: the key prompt is missing")
    return dict(said)
