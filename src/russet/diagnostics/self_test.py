"""Does the device compute what it should? Every operation that the networks use, against the CPU in float32.

This is how a person with a Mac proves an install, and what goes into a bug report:

    for line in self_test("mps"):
        print(line)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from russet.diagnostics.self_test_cases import CASES, NETWORKS, WORKLOAD, Case, NetworkCase, inputs
from russet.diagnostics.self_test_probes import PROBES, Probe
from russet.hardware.facts import Facts, read_facts
from russet.hardware.known_bugs import affected
from russet.planning.plan import Request, plan
from russet.residency.apply import applied, lay_out
from russet.residency.form import form_of

TOLERANCE = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 8e-2}
"""Share of the largest number that rounding may change. CUDA's convolutions round float32 to 10 bits by default."""

Verdict = Literal["ok", "wrong", "failed", "absent", "present"]


@dataclass(frozen=True)
class Line:
    """One result. A case is "ok", "wrong" or "failed" (it raised); a known defect is "absent" or "present".

    difference: the largest one from the reference, as a share of its largest number; None where nothing came.
    expected: for a defect, whether the table of known defects says that this machine has it.
    """

    name: str
    dtype: str
    verdict: Verdict
    difference: float | None = None
    tolerance: float | None = None
    detail: str = ""
    expected: bool = False

    def __str__(self) -> str:
        off = "" if self.difference is None else f"  {self.difference:.1e}"
        limit = "" if self.tolerance is None else f" of {self.tolerance:.0e}"
        return f"{self.verdict:7} {self.dtype:9} {self.name}{off}{limit}{'  ' if self.detail else ''}{self.detail}"

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON has it: a difference that is not finite is left out."""
        found = dataclasses.asdict(self)
        if self.difference is not None and not math.isfinite(self.difference):
            found["difference"] = None
        return found


def passed(lines: Iterable[Line]) -> bool:
    """Whether every case is right. Known defects do not count: Russet goes around them."""
    return all(line.verdict not in ("wrong", "failed") for line in lines)


def self_test(device: str | torch.device | None = None) -> Iterator[Line]:
    """Tests a device, by default the best one, a line at a time.

    Raises:
        DeviceError: the device is not there.
    """
    facts = read_facts(device)
    where = torch.device(device if device is not None else facts.device)
    for case in (case for case in CASES if not any(affected(facts, bug) for bug in case.avoided_for)):
        for dtype in dtypes(facts):
            yield check(case, where, dtype)
    for network in NETWORKS:
        for dtype in dtypes(facts):
            yield check_network(network, where, dtype, facts)
    for probe in PROBES:
        yield look(probe, where, facts)


def dtypes(facts: Facts) -> list[str]:
    """The precisions that pictures may be made in on the device."""
    found = ["float32"] if facts.device == "cpu" else ["float32", "float16"]
    return [*found, "bfloat16"] if facts.bf16 else found


@torch.no_grad()
def check(case: Case, device: torch.device, dtype: str) -> Line:
    """A case on the device, against the CPU in float32 with inputs rounded alike."""
    number = getattr(torch, dtype)
    given = inputs(case.shapes)
    expected = case.compute(*(x.to(number).float() for x in given))
    return compared(
        case.name,
        dtype,
        TOLERANCE[dtype] * case.tolerance,
        lambda: case.compute(*(x.to(device).to(number) for x in given)),
        expected,
    )


@torch.no_grad()
def check_network(case: NetworkCase, device: torch.device, dtype: str, facts: Facts) -> Line:
    """A network on the device as the plan would run it there, against the CPU in float32 with weights rounded alike."""
    number = getattr(torch, dtype)
    given = inputs(case.shapes)
    expected = case.run(case.network().to(number).float(), *(x.to(number).float() for x in given))
    made = plan(facts, WORKLOAD, Request(dtype=dtype))

    def there() -> Tensor:
        network = case.network()
        form = form_of(case.component, made, device)
        network.to(device, form.dtype)
        lay_out(network, form.memory_format)
        applied(network, form)
        return case.run(network, *(x.to(device).to(number) for x in given))

    return compared(case.name, dtype, TOLERANCE[dtype] * case.tolerance, there, expected)


def compared(name: str, dtype: str, tolerance: float, compute: Callable[[], Tensor], expected: Tensor) -> Line:
    """What came, against what should have come."""
    try:
        came = compute().float().cpu()
    except Exception as error:  # whatever it is, it belongs into the report, and the other cases should run
        return Line(name, dtype, "failed", detail=first_line(error))
    if came.shape != expected.shape:
        return Line(name, dtype, "wrong", detail=f"shape {list(came.shape)} instead of {list(expected.shape)}")
    difference = furthest(came, expected)
    return Line(name, dtype, "ok" if difference <= tolerance else "wrong", difference, tolerance)


def furthest(came: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest number expected; infinite where NaN came."""
    scale = max(float(expected.abs().max()), 1e-6)
    difference = float((came - expected).abs().max()) / scale
    return math.inf if math.isnan(difference) else difference


@torch.no_grad()
def look(probe: Probe, device: torch.device, facts: Facts) -> Line:
    """Whether a known defect shows on the device."""
    expected = affected(facts, probe.bug) is not None
    dtype = str(probe.dtype).removeprefix("torch.")
    try:
        difference = furthest(*probe.compute(device))
    except Exception as error:
        return Line(f"defect {probe.bug}", dtype, "present", detail=first_line(error), expected=expected)
    verdict: Verdict = "present" if difference > TOLERANCE[dtype] else "absent"
    return Line(f"defect {probe.bug}", dtype, verdict, difference, TOLERANCE[dtype], expected=expected)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
