"""Can this machine generate images? Every requirement with advice, known defects, and plans for well-known models.

``doctor(read_facts())`` gives a ``Diagnosis``: plain data, for a person to read and for a bug report to carry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from russet.diagnostics.checks import Check, all_checks
from russet.errors import DoesNotFit
from russet.hardware.facts import Facts
from russet.hardware.host_environment import HostEnvironment, read_host_environment
from russet.hardware.known_bugs import Bug, known
from russet.pipelines import registry
from russet.planning import reference_models
from russet.planning.plan import Plan, Request, plan
from russet.planning.workload import Workload

MODELS = {
    "Stable Diffusion 1.5 at 512×512": ("StableDiffusionPipeline", reference_models.sd15),
    "Stable Diffusion XL at 1024×1024": ("StableDiffusionXLPipeline", reference_models.sdxl),
}
"""Title → the pipeline that runs the model, and its workload. Models without a pipeline in Russet are left out."""


@dataclass(frozen=True)
class Forecast:
    """How a model would run on this machine: a plan, or why it cannot."""

    title: str
    plan: Plan | None
    refusal: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that was found."""

    facts: Facts
    host: HostEnvironment
    checks: tuple[Check, ...]
    bugs: tuple[Bug, ...]
    forecasts: tuple[Forecast, ...]

    @property
    def verdict(self) -> Literal["ok", "warning", "problem"]:
        """The worst status among the checks."""
        statuses = {check.status for check in self.checks}
        return "problem" if "problem" in statuses else "warning" if "warning" in statuses else "ok"

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON has it: versions as text, plans as their decisions."""
        return {
            "verdict": self.verdict,
            "facts": plain(dataclasses.asdict(self.facts)),
            "host": plain(dataclasses.asdict(self.host)),
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "bugs": [{name: getattr(bug, name) for name in ("id", "what", "remedy", "link")} for bug in self.bugs],
            "forecasts": [
                {"title": each.title, "refusal": each.refusal, "plan": each.plan.to_dict() if each.plan else None}
                for each in self.forecasts
            ],
        }


def doctor(facts: Facts, host: HostEnvironment | None = None) -> Diagnosis:
    """Judges a machine; ``host`` is read from this process unless given."""
    host = host or read_host_environment()
    return Diagnosis(
        facts=facts,
        host=host,
        checks=tuple(all_checks(facts, host)),
        bugs=known(facts),
        forecasts=tuple(
            forecast(facts, title, make()) for title, (name, make) in MODELS.items() if name in registry.PIPELINES
        ),
    )


def forecast(facts: Facts, title: str, workload: Workload) -> Forecast:
    """The plan for a model that was loaded from the Hub, so that its weights can be read again."""
    try:
        return Forecast(title, plan(facts, workload, Request(reloadable=True)))
    except DoesNotFit as error:
        return Forecast(title, None, str(error))


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, which are tuples, as text; all else as it is."""
    return {name: ".".join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
