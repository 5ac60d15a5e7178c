"""What comes before the first text is computed for one row, and serves both halves of guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import Ask, Case, near, seeded, unet

SHARED = Case("shared", {"shared_prefix": True})


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ["SD 1", "text on the second level", "no middle"])
def test_one_picture_asked_about_two_texts_gives_both_answers(name: str) -> None:
    network = unet(name)
    ask = Ask.of(network, images=2, texts=2)
    expected = ask.answer(network)
    SHARED.apply(network)
    near(ask.answer(network, SHARED), expected)


def test_rows_that_differ_in_time_are_asked_about_two_texts() -> None:
    network = unet()
    x, texts, t = seeded(2, 4, 8, 8, seed=1), seeded(4, 7, 12, seed=2), torch.tensor([100.0, 700.0])
    apart = network(torch.cat([x, x]), torch.cat([t, t]), texts).sample
    SHARED.apply(network)
    near(network(torch.cat([x, x]), torch.cat([t, t]), texts).sample, apart)


@pytest.mark.parametrize(
    ("case", "rows"), [(SHARED, 1), (Case("apart", {"prompt_cache": "keys and values"}), 2)], ids=str
)
def test_the_first_convolution_sees_each_picture_once_where_it_is_shared(case: Case, rows: int) -> None:
    network, seen = unet("text on the second level"), []
    case.apply(network)
    block = network.down_blocks[0].resnets[0]
    block.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))  # after the pass has looked
    Ask.of(network).answer(network, case)
    assert seen == [rows]
