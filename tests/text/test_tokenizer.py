"""The tokenizer against transformers' CLIPTokenizer, and against damaged files."""

from __future__ import annotations

import json
import re
import shutil
import threading
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import russet
from russet.errors import ArgumentTypeError, CheckpointError, ConfigError, InputError, MissingFile, RussetError
from russet.text.tokenizer import CLIPTokenizer
from russet.text.tokenizer_head import STARTERS

MINI = Path(russet.__file__).parent / "mini" / "tokenizer"
FILES = ["vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"]
KEYS = ["bos_token", "pad_token", "content", "added_tokens", "added_tokens_decoder", "model", "vocab", "merges", "id"]
TEXTS = [
    "a photo of an astronaut riding a horse on mars",
    "화성에서 말을 타는 우주비행사",
    "한글과 English, 그리고 日本語 and العربية",
    "🐶🏽 👨‍👩‍👧‍👦 🇰🇷 emoji ✨",
    "",
    " ",
    "  leading, \t tabs \n\n new\r\nlines\u00a0and\u3000wide ",
    "<b>bold</b> &amp; &lt;tag&gt; http://example.com/?a=1&b=2",
    "café cafe\u0301 naïve ÅNGSTRÖM ﬁ ligature İstanbul ß",
    "don't we'll they've I'm he'd it's rock'n'roll",
    "numbers 12345 3.14 ½ ² Ⅷ 1,000",
    "punctuation!!! ... --- ??? ;:'\"[]{}()",
    "<|startoftext|> inside <|endoftext|> and <|ENDOFTEXT|> <|StartOfText|>x",
    "<|endoftext|><|endoftext|>",
    "a" * 400,
    "word " * 300,
    "𝕗𝕒𝕟𝕔𝕪 ｆｕｌｌｗｉｄｔｈ z̴̢͊a̷l̸g̶o̵",
    "\x00\x01\x7f control \u200b zero width \ufeff",
]


@pytest.fixture(scope="module")
def ours() -> CLIPTokenizer:
    return CLIPTokenizer.from_files(MINI)


@pytest.fixture(scope="module")
def theirs():
    from transformers import CLIPTokenizer as Reference

    return Reference.from_pretrained(MINI)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A tokenizer of the 256 byte tokens alone, quick to load."""
    folder = tmp_path_factory.mktemp("small")
    vocab = json.loads((MINI / "vocab.json").read_text())
    few = [token for token, number in vocab.items() if number < 512] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(few)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def padded(tokenizer, texts):
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:24]))
def test_ids_mask_tokens_and_decoded_text_equal_transformers(ours, theirs, text):
    assert ours.encode(text) == theirs.encode(text)
    assert ours.tokenize(text) == theirs.tokenize(text)
    assert torch.equal(padded(ours, text).input_ids, padded(theirs, text).input_ids)
    assert torch.equal(padded(ours, text)["attention_mask"], padded(theirs, text)["attention_mask"])
    for skip in (False, True):
        ids = ours.encode(text)
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=120))
@example("<|endoftext|> \u0130<|startoftext|>")
def test_any_unicode_gives_the_ids_of_transformers(ours, theirs, text):
    assert ours.encode(text) == theirs.encode(text)


def test_a_batch_equals_its_texts_one_by_one(ours, theirs):
    batch = padded(ours, TEXTS)
    assert batch.input_ids.shape == (len(TEXTS), 77)
    assert batch.input_ids.dtype == torch.int64
    assert torch.equal(batch.input_ids, padded(theirs, TEXTS).input_ids)
    assert torch.equal(batch.input_ids, torch.cat([ours(text).input_ids for text in TEXTS]))
    assert ours.batch_decode(batch.input_ids) == theirs.batch_decode(batch.input_ids)


def test_the_defaults_are_padded_to_the_model_length_and_cut(ours):
    assert torch.equal(ours(TEXTS).input_ids, padded(ours, TEXTS).input_ids)


@pytest.mark.parametrize("padding", ["longest", True, "do_not_pad", False])
@pytest.mark.parametrize("truncation", [True, False])
def test_padding_and_truncation_equal_transformers(ours, theirs, padding, truncation):
    for texts in (TEXTS, TEXTS[0]):
        mine = ours(texts, padding=padding, max_length=20, truncation=truncation, return_tensors=None)
        limit = {"max_length": 20} if truncation else {}
        reference = theirs(texts, padding=padding, truncation=truncation, **limit)
        assert dict(mine) == dict(reference)


def test_special_tokens_are_those_of_transformers(ours, theirs):
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(ours, f"{role}_token") == getattr(theirs, f"{role}_token")
        assert getattr(ours, f"{role}_token_id") == getattr(theirs, f"{role}_token_id")
    assert (ours.vocab_size, len(ours), ours.model_max_length) == (theirs.vocab_size, len(theirs), 77)
    assert ours.get_vocab() == theirs.get_vocab()


def test_cut_is_the_end_of_the_prompt_as_it_was_written(ours):
    prompt = "A  Photo,\n OF " * 40
    rest = ours.cut(prompt)
    assert prompt.endswith(rest)
    kept = prompt[: len(prompt) - len(rest)]
    assert ours.encode(kept)[:-1] == padded(ours, prompt).input_ids[0, :-1].tolist()
    assert ours.cut(kept) == ""


@pytest.mark.parametrize("count", [74, 75, 76])
def test_cut_begins_with_the_first_token_that_does_not_fit(ours, count):
    assert len(ours.encode("cat")) == 3
    assert ours.cut(" ".join(["cat"] * count)) == " ".join(["cat"] * max(0, count - 75))


# -- files


def test_saved_files_load_equal_here_and_in_transformers(ours, theirs, tmp_path):
    from transformers import CLIPTokenizer as Reference

    ours.save(tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text()) == json.loads((MINI / "vocab.json").read_text())
    assert (tmp_path / "merges.txt").read_text().split() == (MINI / "merges.txt").read_text().split()
    again, reference = CLIPTokenizer.from_files(tmp_path), Reference.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text) == reference.encode(text)
    assert again.config == ours.config


def test_a_folder_saved_by_transformers_loads_equal(ours, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists(), "this test is about tokenizer.json"
    again = CLIPTokenizer.from_files(tmp_path)
    for text in TEXTS:
        assert again.encode(text) == theirs.encode(text)
    assert again.model_max_length == 77


def test_added_tokens_survive_saving_and_equal_transformers(tmp_path, theirs):
    from transformers import CLIPTokenizer as Reference

    ours, reference = CLIPTokenizer.from_files(MINI), Reference.from_pretrained(MINI)
    new = ["<cat-toy>", "<Cat-Toy_1>", "화성인"]
    assert ours.add_tokens(new) == reference.add_tokens(new) == 3
    assert ours.add_tokens(new[:1]) == 0
    ours.save(tmp_path)
    for tokenizer in (ours, CLIPTokenizer.from_files(tmp_path), Reference.from_pretrained(tmp_path)):
        for text in ("a <cat-toy> and <cat-toy_1>", "a <CAT-TOY>화성인", *TEXTS):
            assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.convert_tokens_to_ids("<cat-toy>") == 2944
        assert len(tokenizer) == 2947


def test_special_tokens_map_wins_over_tokenizer_config_as_in_transformers(tmp_path):
    from transformers import CLIPTokenizer as Reference

    shutil.copytree(MINI, tmp_path, dirs_exist_ok=True)
    special = json.loads((MINI / "special_tokens_map.json").read_text())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "!"}))
    ours, reference = CLIPTokenizer.from_files(tmp_path), Reference.from_pretrained(tmp_path)
    assert ours.pad_token_id == reference.pad_token_id == 0
    for text in ("short!", "hello ! <|endoftext|> !!"):
        assert torch.equal(padded(ours, text).input_ids, padded(reference, text).input_ids)


def test_added_tokens_decoder_form_loads_as_in_transformers(tmp_path):
    from transformers import CLIPTokenizer as Reference

    shutil.copytree(MINI, tmp_path, dirs_exist_ok=True)
    rules = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    config = json.loads((MINI / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        "2942": {"content": "<|startoftext|>", "normalized": True, **rules},
        "2943": {"content": "<|endoftext|>", "normalized": False, **rules},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, reference = CLIPTokenizer.from_files(tmp_path), Reference.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == reference.encode(text)


def test_a_length_that_means_unknown_becomes_clips_own(tmp_path):
    shutil.copytree(MINI, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert CLIPTokenizer.from_files(tmp_path).model_max_length == 77


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("vocab.json", '{"a": "0"}'),
        ("vocab.json", '{"a": 0, "b": 7}'),
        ("vocab.json", '{"a": 0, "b": true}'),
        ("vocab.json", "[" * 100_000),
        ("vocab.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("merges.txt", "#version: 0.2\na b c\n"),
        ("merges.txt", "#version: 0.2\nnotintable alsonot\n"),
        ("tokenizer_config.json", '{"model_max_length": "77"}'),
        ("tokenizer_config.json", '{"model_max_length": 1}'),
        ("special_tokens_map.json", '{"bos_token": 3}'),
        ("special_tokens_map.json", '{"bos_token": {"text": "x"}}'),
        ("added_tokens.json", '{"<x>": "9"}'),
        ("added_tokens.json", '{"<x>": 99999}'),
    ],
)
def test_a_damaged_file_is_a_clear_error(tmp_path, name, text):
    shutil.copytree(MINI, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises((CheckpointError, ConfigError), match=r".{20}"):
        CLIPTokenizer.from_files(tmp_path)


@pytest.mark.parametrize(
    "text", ["{}", '{"model": 3}', '{"model": {"vocab": {"a": 0}, "merges": 5}}', '{"added_tokens": 7}']
)
def test_a_damaged_tokenizer_json_is_a_clear_error(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(RussetError):
        CLIPTokenizer.from_files(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(FILES), data=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4) | JSON)
def test_whatever_a_json_file_holds_it_loads_or_is_our_error(small, name, data):
    path = small / name
    before = path.read_text() if path.exists() else None
    path.write_text(json.dumps(data))
    try:
        CLIPTokenizer.from_files(small).encode("a cat")
    except RussetError:
        pass
    finally:
        path.unlink() if before is None else path.write_text(before)


def test_a_missing_vocabulary_names_the_file(tmp_path):
    with pytest.raises(MissingFile, match=r"vocab\.json"):
        CLIPTokenizer.from_files(tmp_path)


# -- arguments


@pytest.mark.parametrize("bad", [3, None, ["a", 3], [["a"]], b"bytes"])
def test_a_text_that_is_no_str_is_refused(ours, bad):
    with pytest.raises((ArgumentTypeError, TypeError)):
        ours(bad)


def test_other_bad_arguments_are_refused(ours):
    for arguments in ({"padding": "left"}, {"return_tensors": "np"}, {"max_length": 1}):
        with pytest.raises(InputError):
            ours("a", **arguments)
    with pytest.raises(ArgumentTypeError):
        ours("a", max_length=7.5)
    with pytest.raises(InputError, match="lone surrogate"):
        ours("a \ud800 b")
    with pytest.raises(InputError, match="different lengths"):
        ours(["a", "a b c"], padding=False)
    with pytest.raises(InputError):
        ours.add_tokens([" "])
    with pytest.raises(ConfigError, match="vocabulary"):
        CLIPTokenizer.from_config({})


def test_threads_with_different_lengths_do_not_disturb_each_other(ours):
    expected = {length: ours(TEXTS, max_length=length).input_ids for length in (8, 77)}
    wrong = set()

    def work(length: int) -> None:
        results = [ours(TEXTS, max_length=length).input_ids for _ in range(40)]
        wrong.update(length for ids in results if not torch.equal(ids, expected[length]))

    threads = [threading.Thread(target=work, args=(length,)) for length in (8, 77)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_long_text_may_be_cut_only_where_no_character_composes_with_those_before() -> None:
    """By Unicode's tables: no character of the class is combining, or second in a canonical composition."""
    seconds = {*map(chr, range(0x1161, 0x1176)), *map(chr, range(0x11A8, 0x11C3))}
    for code in range(0x110000):
        found = unicodedata.decomposition(chr(code)).split()
        if len(found) == 2 and not found[0].startswith("<"):
            seconds.add(chr(int(found[1], 16)))
    for code in range(0x110000):
        character = chr(code)
        if re.fullmatch(STARTERS, character):
            assert unicodedata.combining(character) == 0
            assert character not in seconds
