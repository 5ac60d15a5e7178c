"""A prompt of millions of characters costs no more than one of a few thousand, and its ids are those of the whole."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from russet import DiffusionPipeline
from russet.text.tokenizer import CLIPTokenizer

from ..conftest import MINI

LENGTH = 10_000_000
LONG = {
    "words": "a photo of a cat ",
    "one letter": "a",
    "one symbol": "!",
    "a word without an end": "abcdefghijklmnopqrstuvwxyz",
    "CJK": "漢字仮名交じり文",
    "Hangul": "한국어",
    "emoji": "😀👩‍👩‍👧",
    "accents apart": "e\u0301",
    "digits": "1234567890",
    "spaces between": "cat" + " " * 500,
}
PARTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            *LONG.values(),
            "\u3042\u3099",  # composes
            "\u1100\u1161\u11a8",  # Hangul, letter by letter
            "a\u0323\u0307",  # marks in another order than NFC's
            "\n\n\t ",
            "\u00a0\u3000",
            "<|endoftext|>",
            "<|startoftext|",
            "<|ENDOFTEXT|>",
            "<dog>",
            "'re",
            "İ",
            "z̴̢͊",
            "นี่คือข้อความ",
            "यह एक वाक्य है",
        ]
    ),
)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(MINI / "tokenizer")


@pytest.fixture(scope="module")
def taught() -> CLIPTokenizer:
    """A tokenizer with tokens of its user's, one with a space in it."""
    made = CLIPTokenizer.from_pretrained(MINI / "tokenizer")
    made.add_tokens(["<dog>", "a very special phrase", "漢字"])
    return made


def of_the_whole(tokenizer: Any, text: str, length: int = 77) -> list[int]:
    """The ids, made from all of the text."""
    first, *body, last = tokenizer.encode(text)
    ids = [first, *body[: length - 2], last]
    return ids + [tokenizer.pad_token_id] * (length - len(ids))


def check(tokenizer: Any, text: str, length: int = 77) -> None:
    assert tokenizer(text, max_length=length).input_ids[0].tolist() == of_the_whole(tokenizer, text, length)


@pytest.mark.parametrize("part", LONG.values(), ids=LONG)
def test_ten_megabytes_are_tokenized_in_a_moment(part: str, tokenizer: Any) -> None:
    text = part * (LENGTH // len(part))
    began = time.process_time()
    ids, lost = tokenizer(text).input_ids[0].tolist(), tokenizer.cut(text)
    assert time.process_time() - began < 1.0
    assert ids == of_the_whole(tokenizer, part * (60_000 // len(part)))
    assert len(text) - len(lost) < 77 * len(part)
    assert text.endswith(lost)


@pytest.mark.parametrize("white", [" ", "\n", "\t", "\u00a0", "\u2028", "\u3000"], ids=ascii)
def test_ten_megabytes_of_white_space_are_skipped_in_a_moment(white: str, tokenizer: Any) -> None:
    text = "a" + white * LENGTH + "cat " * 100
    began = time.process_time()
    ids, lost = tokenizer(text).input_ids[0].tolist(), tokenizer.cut(text)
    assert time.process_time() - began < 1.5
    assert ids == of_the_whole(tokenizer, "a " + "cat " * 100)
    assert lost == "cat " * 26


def test_a_picture_of_a_prompt_of_ten_megabytes_warns_in_few_words(mini: Any, caplog: Any) -> None:
    began = time.process_time()
    mini("a red apple " * (LENGTH // 12), 32, 32, num_inference_steps=1, output_type="latent", seed=0)
    assert time.process_time() - began < 5
    assert "this part is ignored" in caplog.text
    assert len(caplog.text) < 10_000


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(PARTS, min_size=1, max_size=8), times=st.integers(1, 900), length=st.sampled_from([2, 3, 20, 77]))
@example(parts=["a\u0323\u0307"], times=3000, length=77)
@example(parts=["x" * 4095, "\u0301"], times=2, length=77)
@example(parts=[" " * 5000, "cat"], times=2, length=77)
@example(parts=["a very special phrase"], times=400, length=77)
def test_the_ids_are_those_of_the_whole_text(
    parts: list[str], times: int, length: int, tokenizer: Any, taught: Any
) -> None:
    text = "".join(parts * times)[:20_000]
    for one in (tokenizer, taught):
        check(one, text, length)


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(PARTS, min_size=1, max_size=60), seed=st.integers(0, 2**32))
def test_the_ids_of_parts_in_any_order_are_those_of_the_whole_text(
    parts: list[str], seed: int, tokenizer: Any, taught: Any
) -> None:
    text = "".join(random.Random(seed).choices(parts, k=2000))[:12_000]
    for one in (tokenizer, taught):
        check(one, text)


@settings(max_examples=30, deadline=None)
@given(letters=st.text(st.characters(categories=["L"]), min_size=1, max_size=40), seed=st.integers(0, 2**32))
def test_a_word_without_an_end_is_split_as_the_whole_is(letters: str, seed: int, tokenizer: Any) -> None:
    check(tokenizer, "".join(random.Random(seed).choices(letters, k=9000)))


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(PARTS, min_size=1, max_size=30), seed=st.integers(0, 2**32))
def test_what_is_cut_off_a_long_text_is_what_is_cut_off_a_short_one(
    parts: list[str], seed: int, tokenizer: Any
) -> None:
    text = "x " + "".join(random.Random(seed).choices(parts, k=3000))[:9000]
    short = text[:4000]
    lost = tokenizer.cut(short)
    if len(lost) > 1000:  # all that the model reads is far before the end of the short one
        assert tokenizer.cut(text) == lost + text[4000:]


def test_the_ids_of_a_pipelines_long_prompt_draw_the_picture_of_its_beginning(mini: Any) -> None:
    options = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent", "seed": 0}
    assert isinstance(mini, DiffusionPipeline)
    long, short = mini("a red apple " * 50_000, **options), mini("a red apple " * 100, **options)
    assert bool((long.images == short.images).all())
