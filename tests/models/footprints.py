"""What a network's call keeps alive at its widest, counted and predicted, plain and with passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from russet import passes
from russet.hardware.facts import mac
from russet.models.attention import HAS_SDPA, chunked, fused, sliced
from russet.models.footprint import Arithmetic
from russet.passes.base import Changes, Choices, Situation
from russet.planning import reference_models
from russet.planning.plan import Request, plan
from russet.planning.plan_types import AttentionChoice

from ..families import replanned
from ..planning.live_bytes import LiveBytes

ATTENTIONS: dict[str, tuple[AttentionChoice, Any]] = {
    **({"fused": (AttentionChoice(), fused)} if HAS_SDPA else {}),  # without it no plan chooses it
    "sliced": (AttentionChoice(kind="sliced", rows=2), sliced(2)),
    "chunked": (AttentionChoice(kind="chunked", queries=64), chunked(64)),
    "both ways": (AttentionChoice(kind="chunked", queries=64, keys=128), chunked(64, 128)),
}
NO_MAPS = 0.003
PLAIN: dict[str, Any] = {}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "donated": {"buffer_donation": True},
    "packed": {"packed_projections": True},
    "sums in products": {"residual_fusion": "on"},
    "sums in products of copies": {"residual_fusion": "with weight copies", "packed_projections": True},
    "keys and values": {"prompt_cache": "keys and values"},
    "folded": {"prompt_cache": "folded into weights"},
    "all": {
        "buffer_donation": True,
        "shared_prefix": True,
        "packed_projections": True,
        "residual_fusion": "with weight copies",
        "prompt_cache": "folded into weights",
    },
}


def peak_of(call: Callable[[], object]) -> int:
    """Bytes of all that a call made, at its widest moment."""
    with torch.no_grad(), LiveBytes() as counted:
        call()
    return int(counted.peak)


def applied(network: Any, component: str, values: Mapping[str, Any], rows: int = 2) -> Changes:
    return passes.apply(network, component, Choices({**passes.OFF, "offload": None, **values}, rows))


def arithmetic(component: str, values: Mapping[str, Any], **more: Any) -> Arithmetic:
    """How a network with passes computes, as the passes' footprints tell it to the plan."""
    facts, workload, request = mac("M1", memory_gib=64), reference_models.sd15(), Request(fast_paths=False)
    found = replanned(plan(facts, workload, request), **values)
    situation = Situation(facts, workload, request, found)
    footprints = [one.footprint(situation) for one in passes.PASSES if found[one.name] != one.off]
    walks = [one.walk for one in footprints if component in one.components]
    return Arithmetic(**{name: value for walk in walks for name, value in walk.items()}, **more)


def require_predicted(predicted: int, counted: int, within: float = 0.1) -> None:
    """Never too little, but for what is no map (statistics of norms, the time), and not much too much."""
    assert (1 - NO_MAPS) * counted <= predicted <= (1 + within) * counted, f"{predicted} predicted, {counted} counted"
