"""``russet doctor``: whether this machine can generate images, in a few lines; with ``--plan``, all decisions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

import russet

if TYPE_CHECKING:
    from russet.diagnostics.doctor import Diagnosis, Forecast
    from russet.diagnostics.self_test import Line
    from russet.planning.plan import Plan

PROBLEM = 1
"""The exit code where a requirement is not met."""


@click.command("doctor")
@click.option("--device", metavar="NAME", help="The device to check: mps, cuda, cuda:1 or cpu. [default: the best one]")
@click.option("--plan", "with_plan", is_flag=True, help="Also show known defects and every decision, with its reason.")
@click.option("--self-test", is_flag=True, help="Also compute what the networks compute, and compare with the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(device: str | None, with_plan: bool, self_test: bool, as_json: bool) -> int:
    """Checks whether this machine can generate images.

    Shows ok, warning or problem for each requirement, what to do about it, and which models fit in memory. Exits with 1
    if there is a problem, or a wrong result in the self-test.
    """
    from russet.diagnostics.doctor import doctor
    from russet.hardware.facts import read_facts

    report = doctor(read_facts(device))
    if not as_json:
        click.echo("\n".join([*lines(report), *(plan_lines(report) if with_plan else ())]))
    tested = list(shown_self_test(device, quiet=as_json)) if self_test else []
    if tested and not as_json:
        click.echo("  all results are right" if right(tested) else "  some results are wrong")
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
    """Whether every line of a self-test is right; True of none."""
    if not tested:
        return True
    from russet.diagnostics.self_test import passed

    return passed(tested)


GROUPS = {
    "device": ("device", "macOS", "mps"),
    "Python": ("Python",),
    "PyTorch": ("PyTorch",),
    "memory": ("memory available", "memory", "swap"),
    "disk": ("disk",),
    "Hub": ("Hugging Face Hub",),
}
"""The lines that everybody sees, and the checks that each sums up. Other checks are shown where they are not ok."""

FORMATS = {
    "macOS": "macOS {}",
    "mps": "mps {}",
    "memory available": "{} free",
    "memory": "{} in all",
    "swap": "swap {}",
}

VERDICTS = {
    "ok": "This machine is ready.",
    "warning": "This machine is ready. The advice above makes it faster or safer.",
    "problem": "This machine is not ready: see the problems above.",
}


def lines(report: Diagnosis) -> Iterator[str]:
    """The summary: one line for each group of checks, one for each model, and the verdict."""
    checks = {check.name: check for check in report.checks}
    grouped = {name for members in GROUPS.values() for name in members}
    groups = {**GROUPS, **{name: (name,) for name in checks if name not in grouped}}
    width = max(map(len, groups))
    for title, names in groups.items():
        members = [checks[name] for name in names if name in checks]
        worst = max((check.status for check in members), key=("ok", "warning", "problem").index)
        found = (FORMATS.get(check.name, "{}").format(check.found) for check in members)
        yield f"{worst:7}  {title:{width}}  {', '.join(found)}"
        yield from (f"{'':7}  {'':{width}}  → {check.advice}" for check in members if check.advice)
    for forecast in report.forecasts:
        yield from forecast_lines(forecast, width)
    yield f"\n{VERDICTS[report.verdict]}"


def forecast_lines(forecast: Forecast, width: int) -> Iterator[str]:
    """Whether a model fits in memory."""
    if forecast.plan is None:
        yield f"{'no':7}  {'model':{width}}  {forecast.title} does not fit: {forecast.refusal}"
        return
    plan = forecast.plan
    tight = plan.peak > plan.facts.budget
    yield f"{'tight' if tight else 'ok':7}  {'model':{width}}  {plan_summary(forecast.title, plan)}"
    if tight:
        yield f"{'':7}  {'':{width}}  → {plan.tight}"


def plan_summary(title: str, plan: Plan) -> str:
    from russet.hardware.facts import gigabytes

    return f"{title} takes at most {gigabytes(plan.peak)} of {gigabytes(plan.facts.budget)}, in {plan.dtype('unet')}"


def plan_lines(report: Diagnosis) -> Iterator[str]:
    """Known defects of this PyTorch and macOS with their workarounds, and every decision for each model."""
    if report.bugs:
        yield "\nKnown defects here, and how Russet avoids them:"
    for bug in report.bugs:
        yield f"  {bug.what}\n    → {bug.remedy} ({bug.link})"
    for forecast in report.forecasts:
        yield f"\n{forecast.title}:"
        text = forecast.plan.explain() if forecast.plan is not None else forecast.refusal
        yield "\n".join(f"  {line}" for line in text.splitlines())
