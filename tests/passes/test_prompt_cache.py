"""A text that was read once gives every layer what it would have read itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from russet.models.attention import chunked, fused, padded, sliced, upcast
from russet.passes.prompt_cache import LONGEST, PromptCache, cached_prompt, text_layers

from .cases import PADDED, UNETS, Ask, Case, near, seeded, unet

KINDS = ("keys and values", "packed keys and values", "folded into weights")
CASES = {value: Case(value, {"prompt_cache": value, "shared_prefix": True}) for value in KINDS}


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("attention", [fused, PADDED], ids=["fused", "padded"])
@pytest.mark.parametrize("name", ["SD 1", "XL", "only cross-attention", "scale and shift"])
@pytest.mark.parametrize("value", KINDS)
def test_a_text_that_was_read_gives_the_same_answer(value: str, name: str, attention: Any) -> None:
    network = unet(name)
    network.set_attention(attention)
    ask = Ask.of(network, images=2, texts=1)
    expected = ask.answer(network)
    CASES[value].apply(network)
    near(ask.answer(network, CASES[value]), expected)


@pytest.mark.parametrize("value", KINDS)
def test_what_is_kept_can_be_replaced_by_other_tensors(value: str) -> None:
    if value == "folded into weights":
        pytest.skip("a folded text is not recorded")
    network = unet()
    ask = Ask.of(network, images=2, texts=1)
    expected = ask.answer(network)
    CASES[value].apply(network)
    text = cached_prompt(network, ask.context, value)
    assert isinstance(text, PromptCache)
    layers = len(text_layers(network))
    assert len(text.tensors()) == (1 + 2 * layers if value == "keys and values" else 2)
    other = cached_prompt(network, ask.context.flip(0), value)
    assert isinstance(other, PromptCache)
    given = other.with_tensors([tensor.clone() for tensor in text.tensors()])
    near(network(ask.x, 500.0, given).sample, expected)


@pytest.mark.parametrize("name", [*UNETS][:1])
@pytest.mark.parametrize("words", [1, 7, 77, 154])
def test_a_text_of_any_length_can_be_read(words: int, name: str) -> None:
    network, case = unet(name), CASES["folded into weights"]
    ask = Ask(seeded(1, 4, 8, 8, seed=1), seeded(2, words, 12, seed=5), {})
    expected = ask.answer(network)
    case.apply(network)
    near(ask.answer(network, case), expected)
    text = cached_prompt(network, ask.context, "folded into weights")
    assert isinstance(text, PromptCache)
    assert all((text.folded(layer) is not None) == (words <= LONGEST) for layer in text_layers(network))


@pytest.mark.parametrize(
    "attention",
    [sliced(1), chunked(8), upcast(fused), padded(upcast(fused), (6, 16))],
    ids=["sliced", "chunked", "upcast", "padded and upcast"],
)
def test_a_text_is_not_folded_where_attention_was_chosen_for_its_scores(attention: Any) -> None:
    network = unet()
    network.set_attention(attention)
    CASES["folded into weights"].apply(network)
    text = cached_prompt(network, seeded(2, 7, 12), "folded into weights")
    assert isinstance(text, PromptCache)
    layers = text_layers(network)
    assert len(layers) == 4
    assert all(text.folded(layer) is None for layer in layers)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("value", KINDS)
def test_several_rows_and_several_texts_about_each_keep_their_order(value: str, rows: int) -> None:
    network = unet()
    ask = Ask.of(network, images=rows, texts=2)
    expected = ask.answer(network)
    CASES[value].apply(network, rows=2 * rows)
    near(ask.answer(network, CASES[value]), expected)


def test_a_plain_unet_is_given_the_text_as_it_is() -> None:
    context = seeded(2, 7, 12)
    for value in (*KINDS, "off"):
        assert cached_prompt(unet(), context, value) is context
