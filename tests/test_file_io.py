"""Small files: what may be in them, and that a write is whole or has not happened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from russet import file_io
from russet.errors import CheckpointError, CorruptFile, MissingFile


@given(st.dictionaries(st.text(), st.integers(-(2**60), 2**60) | st.text() | st.lists(st.booleans(), max_size=3)))
def test_an_object_comes_back_as_it_was_written(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("json") / "a.json"
    file_io.write_json(path, data)
    assert file_io.read_json(path) == data
    assert path.read_bytes().endswith(b"}\n")
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "empty"),
        (b"[1]", "object"),
        (b"{", "JSON"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "deep"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    ],
    ids=["empty", "list", "cut", "bytes", "pointer", "abyss", "nested", "digits"],
)
def test_a_file_that_is_no_object_says_what_it_is(tmp_path, content, hint):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CorruptFile, match=rf"a\.json.*{hint}"):
        file_io.read_json(tmp_path / "a.json")


def test_a_file_that_cannot_be_read_is_our_error(tmp_path, monkeypatch):
    with pytest.raises(MissingFile, match="none"):
        file_io.read_text(tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot be read"):
        file_io.read_text(tmp_path)
    (tmp_path / "long").write_bytes(b"x" * 11)
    monkeypatch.setattr(file_io, "LARGEST", 10)
    with pytest.raises(CorruptFile, match="too large"):
        file_io.read_text(tmp_path / "long")


def test_a_key_given_twice_is_refused_where_asked():
    assert file_io.parse_json('{"a": 1, "a": 2}', "x") == {"a": 2}
    with pytest.raises(CorruptFile, match="twice"):
        file_io.parse_json('{"a": 1, "a": 2}', "x", unique=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "a.json"
    file_io.write_json(path, {"old": True})

    def cut_short(part: Path, data: bytes) -> None:
        with open(part, "wb") as file:
            file.write(data[:3])
        raise error

    monkeypatch.setattr(Path, "write_bytes", cut_short)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        file_io.write_json(path, {"new": True})
    assert json.loads(path.read_text()) == {"old": True}
    assert os.listdir(tmp_path) == ["a.json"]
