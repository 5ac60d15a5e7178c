"""Times that were computed beforehand are those computed in the call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from russet.errors import InputError
from russet.passes.timestep_embeddings import AT_ONCE, TimestepCache

from .cases import Ask, Case, near, seeded, unet

PRECOMPUTED = Case("precomputed", {"timestep_embeddings": "precomputed"})
PACKED = Case("precomputed and packed", {"timestep_embeddings": "precomputed", "packed_projections": True})


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("case", [PRECOMPUTED, PACKED], ids=str)
def test_times_computed_beforehand_are_those_of_the_call(case: Case) -> None:
    if case is PACKED and not hasattr(torch.Tensor, "untyped_storage"):
        pytest.skip("torch 1.13 cannot tell what lies where, so nothing is packed")
    network = unet()
    ask = Ask.of(network)
    times = [999.0, 500.5, 0.0]
    expected = [ask.answer(network, t=t) for t in times]
    case.apply(network)
    cache = TimestepCache(network, times)
    x = torch.cat([ask.x, ask.x])
    for t, answer in zip(times, expected, strict=True):
        near(network(x, cache(t), ask.context).sample, answer)
    assert cache(123.0) is None


def test_more_times_than_are_computed_at_once_follow_one_another() -> None:
    network = unet()
    PRECOMPUTED.apply(network)
    times = [float(t) for t in range(2 * AT_ONCE)]
    cache = TimestepCache(network, times)
    for t in (times[0], times[AT_ONCE], times[-1]):
        near(cache(t).emb, network.precompute_times([t])[0].emb)
        assert len(cache._made) <= AT_ONCE


def test_a_distilled_unet_has_its_scale_in_the_time() -> None:
    network = unet("LCM")
    ask = Ask.of(network)
    expected = ask.answer(network)
    PRECOMPUTED.apply(network)
    near(ask.answer(network, PRECOMPUTED), expected)


def test_conditions_beside_a_time_that_has_them_are_refused() -> None:
    network = unet("LCM")
    PRECOMPUTED.apply(network)
    time = network.precompute_times([500.0])[0]
    with pytest.raises(InputError, match="conditions in it"):
        network(seeded(2, 4, 8, 8), time, seeded(2, 7, 12), timestep_cond=seeded(2, 5))


def test_who_watches_the_layers_of_the_time_sees_every_step() -> None:
    network, seen = unet(), []
    network.time_embedding.linear_2.register_forward_hook(lambda _, given, result: seen.append(len(result)))
    PRECOMPUTED.apply(network)
    times = [900.0, 500.0]
    cache = TimestepCache(network, times)
    assert [cache(t) for t in times] == [None, None]
    ask = Ask.of(network)
    for t in times:
        ask.answer(network, PRECOMPUTED, t)
    assert seen == [1, 1]
