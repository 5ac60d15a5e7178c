"""Every decision of a plan is obeyed by some code, and none asks for what a network refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from russet.devices import published
from russet.devices.facts import mac, read_facts
from russet.devices.plan import plan

import russet

SOURCE = Path(russet.__file__).parent
READERS = ("pipelines", "models", "checkpoints")
UNREAD = {"causal_mask", "non_blocking"}


def decisions() -> list[str]:
    return [decision.name for decision in plan(mac("M1", memory_gib=16), published.sd15()).decisions]


def is_read(name: str) -> bool:
    """Whether any code outside of the planner asks a plan for a decision, by key, attribute or method."""
    base, _, _ = name.partition(".")
    pattern = re.compile(rf"""plan\[f?["']{base}["'.]|\bplan\.{base}\b|["']{base}["']\]""")
    method = re.compile(rf"\.{base}\(")
    files = [path for part in READERS for path in (SOURCE / part).rglob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in files]
    return any(pattern.search(text) or ("." in name and method.search(text)) for text in texts)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.xfail(strict=True, reason="nothing obeys this decision")] if name in UNREAD else []
        )
        for name in decisions()
    ],
)
def test_some_code_obeys_each_decision(name: str) -> None:
    if name == "watermark":
        pytest.xfail("the environment is set from the rule, before there is a plan: the entry itself has no reader")
    assert is_read(name)


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param(
            mac("M1", memory_gib=16),
            marks=pytest.mark.xfail(strict=True, reason="SDXL's UNet refuses times that are told beforehand"),
        ),
        pytest.param(
            mac("M3 Max", memory_gib=64, macos="15.0", torch="2.5.1"),
            marks=pytest.mark.xfail(strict=True, reason="SDXL's UNet refuses times that are told beforehand"),
        ),
        read_facts("cpu"),
    ],
    ids=["M1", "M3 Max", "CPU"],
)
def test_no_plan_for_a_unet_with_added_conditions_computes_timestep_embeddings_beforehand(facts: object) -> None:
    assert plan(facts, published.sdxl())["times"] == "each call"  # type: ignore[arg-type]


def test_a_plan_for_a_unet_without_them_may() -> None:
    assert plan(mac("M1", memory_gib=16), published.sd15())["times"] == "ahead"
