"""Weights in bfloat16 that are laid out once for oneDNN: the plain network's answer, from copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from russet.backends.cpu import onednn
from russet.hardware.facts import read_facts
from russet.models.unet import UNet2DConditionModel

from .cases import Ask, Case, near, require_same, state, unet

pytestmark = pytest.mark.skipif(
    not (onednn.HAS_LINEAR and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="this CPU or PyTorch computes no bfloat16 by oneDNN",
)
PREPACKED = Case("prepacked", {"weight_prepacking": True})


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def network() -> UNet2DConditionModel:
    return unet().bfloat16()


def asked(network: UNet2DConditionModel, size: tuple[int, int]) -> Ask:
    ask = Ask.of(network, size=size)
    return dataclasses.replace(ask, x=ask.x.bfloat16(), context=ask.context.bfloat16())


def test_a_network_answers_as_before_at_every_size_and_is_restored(network: Any) -> None:
    before, sizes = state(network), ((8, 8), (9, 6), (4, 16))  # weights are laid out for the first of them
    expected = [asked(network, size).answer(network) for size in sizes]
    changes = PREPACKED.apply(network)
    for size, answer in zip(sizes, expected, strict=True):
        near(asked(network, size).answer(network, PREPACKED), answer, 0.03)  # bfloat16 has three digits
    changes.undo()
    require_same(network, before)
    assert torch.equal(asked(network, (8, 8)).answer(network), expected[0])


def test_the_copies_are_freed_when_another_network_works(network: Any) -> None:
    assert PREPACKED.apply(network).copied  # which is what residency asks before it does so


def test_every_weight_is_laid_out_once(network: Any) -> None:
    PREPACKED.apply(network)
    ask = asked(network, (8, 8))
    expected = ask.answer(network, PREPACKED)
    laid_out = {one: one.prepacked._packed for one in network.modules() if hasattr(one, "prepacked")}
    assert len(laid_out) > 50
    assert None not in laid_out.values()
    assert torch.equal(ask.answer(network, PREPACKED), expected)
    assert all(one.prepacked._packed is packed for one, packed in laid_out.items())


def test_gradients_and_other_precisions_are_computed_plainly(network: Any) -> None:
    weight = onednn.PrepackedWeight()
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        assert weight.takes(x, x)
        assert not weight.takes(x.float(), x.float())
    with torch.enable_grad():
        assert not weight.takes(x, x)


def test_it_is_planned_for_bfloat16_on_a_cpu_with_amx_and_room_for_copies() -> None:
    from russet.planning.plan import Request, plan
    from russet.planning.reference_models import sd15

    has_amx = dataclasses.replace(
        read_facts("cpu"), amx=True, onednn=True, bf16=True, available=32 << 30, held=0, memory=64 << 30
    )
    assert plan(has_amx, sd15(), Request())["weight_prepacking"]
    small = dataclasses.replace(has_amx, available=6 << 30)
    assert not plan(small, sd15(), Request())["weight_prepacking"]
    assert not plan(dataclasses.replace(has_amx, amx=False), sd15(), Request())["weight_prepacking"]
