"""The ``parameters`` text in and out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from russet.images.metadata import Parameters

WEBUI = """(a cat:1.2), sitting
on the moon
Negative prompt: blurry, low quality
second line
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 6ce01616, Model: v1-5, \
Lora hashes: "a: 1f, b: 2e", Version: v1.6.0"""


def test_a_text_of_the_web_ui_is_read():
    read = Parameters.of_text(WEBUI)
    assert read.prompt == "(a cat:1.2), sitting\non the moon"
    assert read.negative_prompt == "blurry, low quality\nsecond line"
    assert list(read.settings) == [
        *("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model hash", "Model", "Lora hashes", "Version"),
    ]
    assert read.settings["Sampler"] == "DPM++ 2M Karras"
    assert read.settings["Lora hashes"] == "a: 1f, b: 2e"
    assert read.to_text() == WEBUI


@pytest.mark.parametrize("text", ["", "a cat", "a cat: big, grey", "two\nlines", "\n\n"])
def test_a_text_without_settings_is_all_prompt(text):
    read = Parameters.of_text(text)
    assert (read.prompt, read.negative_prompt, read.settings) == (text.strip(), "", {})


line = st.text(st.characters(blacklist_categories=("Cc", "Cs", "Zl", "Zp")), max_size=30).map(str.strip)
settings = st.dictionaries(
    st.sampled_from(["Steps", "CFG scale", "Seed", "Model", "Face-fix", "Size"]), line, min_size=3
)


@given(line, line, settings)
def test_what_is_written_is_read(prompt, negative, settings):
    written = Parameters(prompt, negative, settings)
    if not prompt.startswith("Negative prompt: "):
        assert Parameters.of_text(written.to_text()) == written


@given(st.text())
def test_any_text_is_read_without_an_error(text):
    Parameters.of_text(text)
