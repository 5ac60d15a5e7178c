"""``russet doctor``: is this machine fit, what is known to be wrong with it, and what would be done about it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

import russet

if TYPE_CHECKING:
    from russet.diagnostics.doctor import Diagnosis
    from russet.diagnostics.self_test import Line

PROBLEM = 1
"""The exit code where a requirement is not met."""


@click.command("doctor")
@click.option("--device", metavar="NAME", help="The device to judge: mps, cuda, cuda:1 or cpu. [default: the best one]")
@click.option("--self-test", is_flag=True, help="Also compute what the networks compute, and compare with the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(device: str | None, self_test: bool, as_json: bool) -> int:
    """Checks this machine, and tells what would be done on it.

    Every requirement is a line: ok, warning or problem, and what to do. Then come the known defects of this PyTorch and
    this macOS, and the plan for two well-known models. Ends with 1 where there is a problem, or a wrong result.
    """
    from russet.diagnostics.doctor import doctor
    from russet.hardware.facts import read_facts

    report = doctor(read_facts(device))
    if not as_json:
        click.echo("\n".join(lines(report)))
    tested = list(shown_self_test(device, quiet=as_json)) if self_test else []
    if tested and not as_json:
        click.echo("  all as it should be" if right(tested) else "  not all as it should be")
    if as_json:
        found = {"self_test": [line.to_dict() for line in tested]} if self_test else {}
        click.echo(json.dumps({"russet": russet.__version__, **report.to_dict(), **found}, indent=2))
    return 0 if report.verdict != "problem" and right(tested) else PROBLEM


def shown_self_test(device: str | None, *, quiet: bool) -> Iterator[Line]:
    """Runs the self-test, each line shown as it comes."""
    from russet.diagnostics.self_test import self_test

    if not quiet:
        click.echo("\nSelf-test: largest difference from the CPU in float32, as a share of the largest number")
    for line in self_test(device):
        if not quiet:
            click.echo(f"  {line}")
        yield line


def right(tested: Sequence[Line]) -> bool:
    """Whether every line of a self-test is as it should be; of none, too."""
    if not tested:
        return True
    from russet.diagnostics.self_test import passed

    return passed(tested)


def lines(report: Diagnosis) -> Iterator[str]:
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
