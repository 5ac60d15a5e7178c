"""Which optimisations pay on a device: each pass is asked, and gives its reason."""

from __future__ import annotations

from russet.hardware.facts import Facts
from russet.passes import PASSES
from russet.passes.base import Situation
from russet.planning.plan_types import Decision, Decisions, Request
from russet.planning.workload import Workload


def fast_paths(facts: Facts, workload: Workload, request: Request, found: Decisions) -> Decisions:
    """``found``, and a decision of every pass, each made with those before it in view."""
    for one in PASSES:
        if request.fast_paths is False:
            decision = Decision(one.name, one.off, "your choice", by="user")
        elif facts.device not in one.devices:
            decision = Decision(one.name, one.off, one.elsewhere)
        else:
            decision = Decision(one.name, *one.decide(Situation(facts, workload, request, found)))
        found = found.extended([decision])
    return found
