"""The plan: what to do on this machine, decided in one place by a pure function, each decision with its reason.

    facts = read_facts("mps")                       # or mac("M1", memory_gib=8)
    workload = Workload.of(unet=…, vae=…, text_encoder=…, width=512, height=512, images=4)
    print(plan(facts, workload, Request()).explain())

What a pipeline does with each decision is written in ``MEANING``, one line per name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from russet.errors import DoesNotFit
from russet.hardware.facts import Facts
from russet.planning.memory import Estimate
from russet.planning.plan_types import (
    MEANING,
    AttentionChoice,
    Decision,
    Decisions,
    Request,
    Tile,
    format_value,
    gigabytes,
)
from russet.planning.strategies import best, largest_fit, least_peak
from russet.planning.workload import Workload

__all__ = ["MEANING", "AttentionChoice", "Decision", "Plan", "Request", "Tile", "plan"]


@dataclass(frozen=True, kw_only=True)
class Plan(Decisions):
    """All decisions, and the memory that they are predicted to take: ``plan["micro_batch"]``, ``plan.peak``."""

    facts: Facts
    workload: Workload
    estimate: Estimate

    @property
    def peak(self) -> int:
        """Predicted bytes at the widest moment of the call."""
        return self.estimate.peak

    def precise_attention(self, component: str) -> AttentionChoice:
        """What a component attends by once half precision has overflowed: float32, in the same way."""
        return replace(self.attention(component), upcast=True)

    def __str__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """The plan in readable lines."""
        facts, workload = self.facts, self.workload
        lines = [
            f"{workload.images} × {workload.width}×{workload.height} on {facts.chip} ({facts.device}): at most"
            f" {gigabytes(self.peak)} of the {gigabytes(facts.budget)} that are free",
            *(f"  {phase.name}: {gigabytes(phase.peak)}" for phase in self.estimate.phases),
            *(f"  {decision}" for decision in self.decisions),
        ]
        if self.peak > facts.budget:
            lines.insert(
                1, f"  tight, though within the {gigabytes(facts.limit)} that the device allows: close other programs"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return {
            "width": self.workload.width,
            "height": self.workload.height,
            "images": self.workload.images,
            "peak_bytes": self.peak,
            "budget_bytes": self.facts.budget,
            "limit_bytes": self.facts.limit,
            "phases": {phase.name: phase.peak for phase in self.estimate.phases},
            "decisions": {
                decision.name: {"value": format_value(decision.value), "reason": decision.reason, "by": decision.by}
                for decision in self.decisions
            },
        }


def plan(facts: Facts, workload: Workload, request: Request | None = None) -> Plan:
    """Decides how to do the work on a machine. Pure: the same arguments give the same plan.

    Raises:
        DoesNotFit: no way of doing it stays within the machine's limits; says which size would.
        InputError: an attention slice size larger than the number of heads.
    """
    asked = request or Request()
    chosen = best(facts, workload, asked)
    if chosen is None:
        raise DoesNotFit(refusal(facts, workload, asked))
    found, estimate = chosen
    return Plan(decisions=found.decisions, facts=facts, workload=workload, estimate=estimate)


def refusal(facts: Facts, workload: Workload, request: Request) -> str:
    """What is missing, and the largest picture of the same shape that would fit."""
    least = least_peak(facts, workload, request)
    fits = largest_fit(facts, workload, request)
    if fits:
        advice = f"the largest of this shape that fits is {fits[0]}×{fits[1]}"
    else:
        advice = "no size fits, since the networks alone are too large: half precision or a smaller model may fit"
    return (
        f"{workload.images} × {workload.width}×{workload.height} pixels need at least {gigabytes(least)} on"
        f" {facts.chip}, and it has {gigabytes(facts.limit)} for them; {advice}"
    )
