"""The plan: what to do on this machine, decided in one place by a pure function, each decision with its reason.

    facts = read_facts("mps")                       # or mac("M1", memory_gib=8)
    workload = Workload.of(unet=…, vae=…, text_encoder=…, width=512, height=512, images=4)
    print(plan(facts, workload, Request()).explain())

What a pipeline does with each decision is written in ``MEANING``, one line per name.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from russet.errors import DoesNotFit
from russet.hardware.facts import Facts, gigabytes
from russet.planning.memory import Estimate
from russet.planning.plan_types import (
    MEANING,
    AttentionChoice,
    Decision,
    Decisions,
    Request,
    Tile,
    format_value,
)
from russet.planning.strategies import best, largest_fit, least_peak
from russet.planning.workload import Workload

__all__ = ["MEANING", "AttentionChoice", "Decision", "Plan", "Request", "Tile", "plan"]


@dataclass(frozen=True, kw_only=True, repr=False)
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

    def __repr__(self) -> str:
        workload, changed = self.workload, sum(decision.by == "user" for decision in self.decisions)
        offload = f", offload {self.offload}" if self.offload else ""
        return (
            f"<Plan: {workload.images} × {workload.width}×{workload.height} on {self.facts.chip} ({self.facts.device}),"
            f" UNet in {self.dtype('unet')}{offload}, peak {gigabytes(self.peak)}, {changed} requested>"
        )

    def __str__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """The plan in readable lines."""
        lines = [
            self.summary,
            *(f"  {phase.name}: {gigabytes(phase.peak)}" for phase in self.estimate.phases),
            *(f"  {decision}" for decision in self.decisions),
        ]
        if self.peak > self.facts.budget:
            lines.insert(1, f"  {self.tight}")
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """One line: the work, the device, and the memory."""
        facts, workload = self.facts, self.workload
        return (
            f"{workload.images} × {workload.width}×{workload.height} on {facts.chip} ({facts.device}): at most"
            f" {gigabytes(self.peak)} of the {gigabytes(facts.budget)} that are free"
        )

    @property
    def tight(self) -> str:
        """What to do where the work needs more than what is free now."""
        limit = gigabytes(self.facts.limit)
        return f"more than what is free, though within the {limit} that the device allows: close other programs"

    def _repr_html_(self) -> str:
        """The plan as a table for notebooks."""
        from html import escape

        rows = "".join(
            f"<tr><td>{escape(one.name)}</td><td>{escape(format_value(one.value))}</td>"
            f"<td>{'as requested; ' if one.by == 'user' else ''}{escape(one.reason)}</td></tr>"
            for one in self.decisions
        )
        head = "<tr><th>decision</th><th>value</th><th>reason</th></tr>"
        return f"<p>{escape(self.summary)}</p><table>{head}{rows}</table>"

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


@dataclass(frozen=True)
class PlanCache:
    """The latest plans of a pipeline, so that calls of one kind share one plan.

    A plan depends on the facts, the workload and the request. Free memory differs at every call, and a plan must not
    change with it for a few megabytes: kernels are compiled, weights laid out and graphs recorded for a plan. So a plan
    is reused while all else is the same, the budget is within an eighth of what it was made for, and its peak still
    fits in the budget (unless it did not when it was made).
    """

    plans: deque[tuple[Request, Plan]] = field(default_factory=lambda: deque(maxlen=8))

    def plan(self, facts: Facts, workload: Workload, request: Request) -> Plan:
        """The plan, made now or before; raises what ``plan`` raises."""
        for asked, made in tuple(self.plans):
            if asked == request and made.workload == workload and still_holds(made, facts):
                return made
        made = plan(facts, workload, request)
        self.plans.append((request, made))
        return made


def still_holds(made: Plan, facts: Facts) -> bool:
    """Whether a plan for the same work holds on a device whose free memory may have changed."""
    same = replace(made.facts, available=facts.available, held=facts.held, swap_used=facts.swap_used) == facts
    near = abs(facts.budget - made.facts.budget) <= made.facts.budget // 8
    return same and near and (made.peak <= facts.budget or made.peak > made.facts.budget)


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
