from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from russet.checkpoints.formats.weight_files import open_weights
from russet.errors import CorruptFile, MissingFile, RussetError

from ..made import needs_float8, safetensors_bytes

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = bytes(8)


def opened(folder: Path, content: bytes) -> Any:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return open_weights(path)


@pytest.mark.parametrize(
    "dtype",
    [
        *("float32", "float16", "bfloat16", "float64", "int64", "int8", "uint8", "bool"),
        *(pytest.param(name, marks=needs_float8) for name in ("float8_e4m3fn", "float8_e5m2")),
    ],
)
def test_every_type_is_read_as_safetensors_writes_it(dtype: str, tmp_path: Path) -> None:
    value = (torch.randn(3, 5) * 3).to(getattr(torch, dtype))
    save_file({"a": value, "empty": value[:0].clone(), "scalar": value[0, 0].clone()}, tmp_path / "x.safetensors")
    found = open_weights(tmp_path / "x.safetensors").tensors
    for name, expected in {"a": value, "empty": value[:0], "scalar": value[0, 0]}.items():
        read = found[name].read()
        assert read.dtype == value.dtype
        assert read.shape == expected.shape
        assert torch.equal(read.reshape(-1).view(torch.uint8), expected.clone().reshape(-1).view(torch.uint8))


def test_metadata_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", {"format": "pt", "modelspec.title": "모델"})
    assert open_weights(tmp_path / "x.safetensors").metadata == {"format": "pt", "modelspec.title": "모델"}


BROKEN = {
    "an empty file": b"",
    "five bytes": b"\x05\0\0\0\0",
    "no header": bytes(8),
    "a header longer than the file": safetensors_bytes({"a": F32}, EIGHT, length=10_000),
    "a header of 2**63 bytes": safetensors_bytes({"a": F32}, EIGHT, length=1 << 63),
    "a header that is cut off": safetensors_bytes({"a": F32}, EIGHT, length=20),
    "no JSON": safetensors_bytes(b"not json at all", EIGHT),
    "no UTF-8": safetensors_bytes(b'{"\xff":1}', EIGHT),
    "a list": safetensors_bytes([1, 2], EIGHT),
    "a thousand brackets": safetensors_bytes(b"[" * 1000, EIGHT),
    "a hundred thousand brackets": safetensors_bytes(b"[" * 100_000, EIGHT),
    "forty levels": safetensors_bytes(b'{"a":' * 40 + b"1" + b"}" * 40, EIGHT),
    "a number of 5000 digits": safetensors_bytes(b'{"a":' + b"9" * 5000 + b"}", EIGHT),
    "a tensor that is no object": safetensors_bytes({"a": 3}, EIGHT),
    "no shape": safetensors_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
    "an unknown type": safetensors_bytes({"a": {**F32, "dtype": "F99"}}, EIGHT),
    "a type that is a list": safetensors_bytes({"a": {**F32, "dtype": ["F32"]}}, EIGHT),
    "a negative shape": safetensors_bytes({"a": {**F32, "shape": [-2]}}, EIGHT),
    "a fractional shape": safetensors_bytes({"a": {**F32, "shape": [2.0]}}, EIGHT),
    "a true shape": safetensors_bytes({"a": {**F32, "shape": [True]}}, EIGHT),
    "a shape of a petabyte": safetensors_bytes({"a": {**F32, "shape": [1 << 48]}}, EIGHT),
    "a shape that overflows": safetensors_bytes({"a": {**F32, "shape": [1 << 40, 1 << 40]}}, EIGHT),
    "too many dimensions": safetensors_bytes({"a": {**F32, "shape": [1] * 60 + [2]}}, EIGHT),
    "negative offsets": safetensors_bytes({"a": {**F32, "data_offsets": [-8, 0]}}, EIGHT),
    "three offsets": safetensors_bytes({"a": {**F32, "data_offsets": [0, 8, 8]}}, EIGHT),
    "offsets that are too short": safetensors_bytes({"a": {**F32, "data_offsets": [0, 4]}}, EIGHT),
    "overlapping tensors": safetensors_bytes({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
    "the same bytes twice": safetensors_bytes({"a": F32, "b": F32}, EIGHT),
    "a gap": safetensors_bytes({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)),
    "data cut short": safetensors_bytes({"a": F32}, bytes(7)),
    "data left over": safetensors_bytes({"a": F32}, bytes(9)),
    "a name given twice": safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        EIGHT,
    ),
    "metadata that is no object": safetensors_bytes({"__metadata__": [1], "a": F32}, EIGHT),
    "metadata that is no text": safetensors_bytes({"__metadata__": {"a": 1}, "a": F32}, EIGHT),
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n",
    "a web page": b"<!DOCTYPE html><html>not found</html>",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_or_hostile_file_is_refused_by_name(what: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"model\.safetensors"):
        opened(tmp_path, BROKEN[what])


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write((60 << 20).to_bytes(8, "little"))
        file.truncate(70 << 20)  # sparse
    with pytest.raises(CorruptFile, match="refused"):
        open_weights(path)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "download it again"),
        (BROKEN["a git-lfs pointer"], "git lfs pull"),
        (BROKEN["data cut short"], "cut short"),
    ],
)
def test_the_error_says_what_to_do(content: bytes, hint: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=hint):
        opened(tmp_path, content)


def test_a_missing_file_a_folder_and_a_forbidden_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="No such file"):
        open_weights(tmp_path / "nothing.safetensors")
    with pytest.raises(CorruptFile, match="is a folder"):
        open_weights(tmp_path)


numbers = st.integers(-(1 << 70), 1 << 70) | st.integers(-4, 40)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BOOL", "I64", "x"]) | st.none() | numbers,
        "shape": st.lists(numbers, max_size=4) | st.none(),
        "data_offsets": st.lists(numbers, max_size=3),
        "other": st.none(),
    },
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=4), entries | st.none() | numbers, max_size=4), st.binary(max_size=40))
def test_random_headers_give_only_our_errors(header: dict[str, Any], data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(RussetError):
        weights = opened(Path(folder), safetensors_bytes(header, data))
        for tensor in weights.tensors.values():
            assert tuple(tensor.read().shape) == tensor.shape


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_sound_file_with_bytes_changed_gives_tensors_or_our_errors(data: st.DataObject) -> None:
    sound = safetensors_bytes(json.loads(json.dumps({"a": F32, "b": {**F32, "data_offsets": [8, 16]}})), bytes(16))
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(RussetError):
        for tensor in opened(Path(folder), bytes(content[:cut])).tensors.values():
            tensor.read()
