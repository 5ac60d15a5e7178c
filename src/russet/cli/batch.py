"""``russet batch FILE``: many prompts with one model, loaded once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from russet.cli.common import Screen
from russet.cli.generate import Job, generate, job_options, load
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
"""The keys of a JSON line, each for the option of its name, and their types."""

TYPES: dict[str, tuple[type, ...]] = {"a text": (str,), "a whole number": (int,), "a number": (int, float)}
FAILED = 1


@click.command("batch")
@click.argument("file")
@job_options
def command(file: str, **options: Any) -> int:
    """Generates images from every prompt of FILE, with one model.

    FILE has a prompt on each line, or a JSON object with the key prompt and any of negative, steps, guidance, seed,
    width, height, number and output; `-` is stdin. The options stand for what a line leaves out. All lines are checked
    before the first is generated. A prompt that fails is reported, and the others go on. With --json each report is a
    line.
    """
    text = sys.stdin.read() if file == "-" else read_text(Path(file))
    jobs = list(read_jobs(text.splitlines(), Job(prompt="", **options), file))
    if not jobs:
        raise InputError(f"{file} holds no prompt")
    screen = Screen(quiet=options["quiet"] or options["as_json"])
    code = 0
    with screen.warnings():
        pipe, times = load(jobs[0], screen)
        for count, job in enumerate(jobs, start=1):
            screen.line(f"{count} of {len(jobs)}: {job.prompt}")
            try:
                generate(job, pipe, screen, times)
            except (InputError, DoesNotFit) as error:
                click.echo(f"russet: {job.prompt!r} failed: {error}", err=True)
                code = FAILED
            times = {}  # starting and loading count for the first only
    return code


def read_jobs(lines: Iterable[str], pattern: Job, where: str) -> Iterator[Job]:
    """The job of each line that is not empty; ``pattern`` holds what a line leaves out.

    Raises:
        InputError: a line is no prompt and no object with the right keys; the error names it.
    """
    for number, line in enumerate(lines, start=1):
        if not (text := line.strip()):
            continue
        given: dict[str, Any] = (
            {"prompt": text} if not text.startswith("{") else read_object(text, f"{where}, line {number}")
        )
        if "output" in given:
            given["output"] = Path(given["output"])
        try:
            yield replace(pattern, **given).checked()
        except RussetError as error:
            raise InputError(f"{where}, line {number}: {error}") from None


def read_object(text: str, where: str) -> dict[str, Any]:
    """A JSON line, its keys and the types of its values checked."""
    try:
        given = parse_json(text, where)
    except RussetError as error:
        raise InputError(str(error)) from None
    if unknown := [key for key in given if key not in KEYS]:
        raise InputError(f"{where}: no key is called {', '.join(unknown)}; there are {', '.join(KEYS)}")
    for key, value in given.items():
        if not isinstance(value, TYPES[KEYS[key]]) or isinstance(value, bool):
            raise InputError(f"{where}: {key} must be {KEYS[key]}, not {json.dumps(value)}")
    if "prompt" not in given:
        raise InputError(f"{where}: the key prompt is missing")
    return dict(given)
