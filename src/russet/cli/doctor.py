"""``russet doctor``: is this machine fit, what is known to be wrong with it, and what would be done about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

import russet

if TYPE_CHECKING:
    from russet.devices.doctor import Report

PROBLEM = 1
"""The exit code where a requirement is not met."""


@click.command("doctor")
@click.option("--device", metavar="NAME", help="The device to judge: mps, cuda, cuda:1 or cpu. [default: the best one]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(device: str | None, as_json: bool) -> int:
    """Checks this machine, and tells what would be done on it.

    Every requirement is a line: ok, warning or problem, and what to do. Then come the known defects of this PyTorch and
    this macOS, and the plan for two well-known models. Ends with 1 where there is a problem.
    """
    from russet.devices.doctor import doctor
    from russet.devices.facts import read_facts

    report = doctor(read_facts(device))
    if as_json:
        click.echo(json.dumps({"russet": russet.__version__, **report.to_dict()}, indent=2))
    else:
        click.echo("\n".join(lines(report)))
    return PROBLEM if report.verdict == "problem" else 0


def lines(report: Report) -> Iterator[str]:
    """The report as a person reads it."""
    width = max(len(check.name) for check in report.checks)
    for check in report.checks:
        yield f"{check.status:7}  {check.name:{width}}  {check.found}"
        if check.advice:
            yield f"{'':7}  {'':{width}}  → {check.advice}"
    if report.bugs:
        yield "\nKnown defects here, and what Russet does about them:"
    for bug in report.bugs:
        yield f"  {bug.what}\n    → {bug.remedy} ({bug.link})"
    for forecast in report.forecasts:
        yield f"\n{forecast.title}:"
        text = forecast.plan.explain() if forecast.plan is not None else forecast.refusal
        yield "\n".join(f"  {line}" for line in text.splitlines())
