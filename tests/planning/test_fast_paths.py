"""Which ways of computing the same with less work a device gets, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from russet.hardware.facts import GIB, Facts, mac
from russet.planning import reference_models
from russet.planning.plan import Plan, Request, plan
from russet.planning.workload import Workload

FAST = {
    "residual_fusion": "with weight copies",
    "timestep_embeddings": "precomputed",
    "prompt_cache": "folded into weights",
}
PLAIN = {"residual_fusion": "off", "timestep_embeddings": "per call", "prompt_cache": "off"}


def on(torch: str = "2.13.0", macos: str = "15.0", memory: float = 16, free: float | None = None) -> Facts:
    return mac("M1", memory_gib=memory, torch=torch, macos=macos, available_gib=free)


def made(facts: Facts, sizes: Workload | None = None, **asked: Any) -> Plan:
    return plan(facts, reference_models.sd15(safety_checker=False) if sizes is None else sizes, Request(**asked))


def paths(found: Plan) -> dict[str, Any]:
    return {name: found[name] for name in FAST}


def test_a_mac_with_flash_kernels_gets_all_of_them():
    found = made(on())
    assert paths(found) == FAST
    assert "folded into the weights" in found.why("prompt_cache").reason


def test_float32_has_no_memory_left_for_copies():
    found = made(on(), dtype="float32")
    assert paths(found) == FAST | {"residual_fusion": "on", "prompt_cache": "keys and values"}
    assert "float32" in found.why("residual_fusion").reason


def test_before_macos_15_sums_are_apart_since_operands_would_be_copied():
    found = made(on(macos="14.6"))
    assert paths(found) == FAST | {"residual_fusion": "off"}
    assert "copied" in found.why("residual_fusion").reason


def test_texts_stay_apart_from_weights_where_attention_is_ours_to_compute():
    assert made(on(torch="2.12.1"))["prompt_cache"] == "keys and values"
    assert made(on(), attention_slicing="auto")["prompt_cache"] == "keys and values"
    assert made(on(), attention_slicing="off")["prompt_cache"] == "folded into weights"
    sizes = reference_models.sd15(safety_checker=False)
    upcast = dataclasses.replace(sizes, unet=dataclasses.replace(sizes.unet, upcast_attention=True))
    found = made(on(), upcast)
    assert found["prompt_cache"] == "keys and values"
    assert "float32 scores" in found.why("prompt_cache").reason


def test_short_memory_keeps_less():
    assert paths(made(on(memory=8))) == FAST  # beside macOS and a browser
    small = made(on(memory=8, free=2))
    assert paths(small) == FAST | {"residual_fusion": "on", "prompt_cache": "keys and values"}
    assert "too much" in small.why("prompt_cache").reason
    several = made(on(), reference_models.sd15(safety_checker=False, images=4))
    assert several["prompt_cache"] == "keys and values"
    assert made(on(), reference_models.sd15(safety_checker=False, images=64))["prompt_cache"] == "off"


def test_models_whose_texts_take_much_keep_keys_and_values():
    assert made(on(memory=64), reference_models.sdxl())["prompt_cache"] == "keys and values"


@pytest.mark.parametrize(("device", "text"), [("cpu", "keys and values"), ("cuda", "packed keys and values")])
def test_other_devices_compute_as_they_did(device, text):
    facts = Facts(device=device, chip="chip", memory=24 * GIB, available=24 * GIB, torch=(2, 13, 0), ram=64 * GIB)
    assert paths(made(facts)) == PLAIN | {"prompt_cache": text}


def test_a_gpu_with_kernels_doubles_large_maps_by_transposed_convolutions():
    card = Facts(device="cuda", chip="chip", memory=24 * GIB, available=24 * GIB, torch=(2, 13, 0), ram=64 * GIB)
    able = dataclasses.replace(card, triton=True, capability=(8, 0))
    found = made(able)
    assert found["upsample_fusion"]
    assert "never written" in found.why("upsample_fusion").reason
    wide = made(able, dtype=dict.fromkeys(("unet", "vae", "text_encoder"), "float32"))
    for plain in (made(card), made(able, offload="sequential"), made(able, fast_paths=False), made(on()), wide):
        assert not plain["upsample_fusion"]
    assert made(able, fast_paths=False).why("upsample_fusion").by == "user"


@pytest.mark.parametrize(
    ("images", "side", "recorded"), [(1, 512, True), (8, 512, True), (2, 1024, True), (16, 512, False)]
)
def test_calls_are_recorded_as_far_as_launching_takes_longer_than_running(images, side, recorded):
    card = Facts(device="cuda", chip="chip", memory=80 * GIB, available=80 * GIB, torch=(2, 13, 0), ram=64 * GIB)
    found = made(card, reference_models.sd15(width=side, height=side, images=images, safety_checker=False))
    assert found["cuda_graphs"] == recorded, found.why("cuda_graphs").reason
    assert not made(on(), reference_models.sd15(images=images))["cuda_graphs"]


def test_layers_that_come_and_go_keep_nothing():
    assert paths(made(on(), offload="sequential")) == PLAIN


def test_who_wants_pytorchs_own_operations_gets_them():
    found = made(on(), fast_paths=False)
    assert paths(found) == PLAIN
    assert all(found.why(name).by == "user" for name in PLAIN)
