from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from russet.checkpoints.formats.tensor_source import DerivedTensor
from russet.checkpoints.formats.weight_files import (
    choose_weight_files,
    is_weight_file,
    open_shards,
    open_weights,
    variants_of,
)
from russet.errors import CorruptFile, MissingFile, UnsafeFile

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Any:
    """Two shards and an index whose data the test may change."""

    def made(**changes: Any) -> Path:
        save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "model-00001-of-00002.safetensors")
        save_file({"c": torch.arange(4)}, tmp_path / "model-00002-of-00002.safetensors")
        one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
        data = {"metadata": {"total_size": 52}, "weight_map": {"a": one, "b": one, "c": two}, **changes}
        (tmp_path / INDEX).write_text(json.dumps(data))
        return tmp_path / INDEX

    return made


def test_shards_are_one_set_of_tensors(sharded: Any) -> None:
    weights = open_shards(sharded())
    assert {name: tensor.shape for name, tensor in weights.tensors.items()} == {"a": (2,), "b": (3,), "c": (4,)}
    assert torch.equal(weights.tensors["c"].read(), torch.arange(4))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "a\\b", "C:x", "..", ".", "", "a\0b"])
def test_a_shard_outside_of_the_folder_is_refused(name: str, sharded: Any) -> None:
    with pytest.raises(UnsafeFile, match="without a folder"):
        open_shards(sharded(weight_map={"a": name}))


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "nothing.safetensors"])
def test_a_shard_that_no_file_can_be_is_missing(name: str, sharded: Any) -> None:
    with pytest.raises(MissingFile, match="cannot be opened"):
        open_shards(sharded(weight_map={"a": name}))


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}, {"a": ["x"]}, "x"])
def test_an_index_without_a_map_is_refused(weight_map: Any, sharded: Any) -> None:
    with pytest.raises(CorruptFile, match="weight_map"):
        open_shards(sharded(weight_map=weight_map))


def test_a_missing_shard_is_named(sharded: Any, tmp_path: Path) -> None:
    index = sharded()
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingFile, match="00002-of-00002"):
        open_shards(index)


def test_a_tensor_that_its_shard_does_not_have_is_named(sharded: Any) -> None:
    with pytest.raises(CorruptFile, match=r"places 'x' in model-00001-of-00002"):
        open_shards(sharded(weight_map={"x": "model-00001-of-00002.safetensors"}))


def test_a_file_is_opened_by_what_it_contains(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.ckpt")
    torch.save({"b": torch.ones(2)}, tmp_path / "x.safetensors")
    assert set(open_weights(tmp_path / "x.ckpt").tensors) == {"a"}
    assert set(open_weights(tmp_path / "x.safetensors").tensors) == {"b"}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CorruptFile, match="not a regular file"):
        open_weights(tmp_path / "x.safetensors")


def test_a_derived_tensor_is_made_when_it_is_read(tmp_path: Path) -> None:
    save_file({"qkv": torch.arange(6.0)}, tmp_path / "x.safetensors")
    origin = open_weights(tmp_path / "x.safetensors").tensors["qkv"]
    third = DerivedTensor(origin, (2,), lambda value: value[2:4])
    assert torch.equal(third.read(), torch.tensor([2.0, 3.0]))


DIFFUSERS = {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"}
TRANSFORMERS = {"safetensors": "model", "bin": "pytorch_model"}
ALL = {
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
    "diffusion_pytorch_model.non_ema.safetensors",
    "config.json",
}


@pytest.mark.parametrize(
    ("variant", "use_safetensors", "expected"),
    [
        (None, None, "diffusion_pytorch_model.safetensors"),
        (None, False, "diffusion_pytorch_model.bin"),
        ("fp16", None, "diffusion_pytorch_model.fp16.safetensors"),
        ("fp16", False, "diffusion_pytorch_model.fp16.bin"),
        ("non_ema", True, "diffusion_pytorch_model.non_ema.safetensors"),
        ("non_ema", False, "diffusion_pytorch_model.bin"),  # falls back, for the caller to report
        ("ema", None, "diffusion_pytorch_model.safetensors"),
    ],
)
def test_the_right_file_is_chosen(variant: str | None, use_safetensors: bool | None, expected: str) -> None:
    files = choose_weight_files(ALL, DIFFUSERS, variant, use_safetensors, "here")
    assert files.files == (expected,)
    assert (files.variant == variant) == (variant is None or variant in expected)


def test_the_variant_comes_before_safetensors() -> None:
    files = choose_weight_files({"model.safetensors", "pytorch_model.fp16.bin"}, TRANSFORMERS, "fp16", None, "here")
    assert files.files[0] == "pytorch_model.fp16.bin"


SHARDED = {
    "plain": (None, "model.safetensors.index.json", "model-0000{}-of-00002.safetensors"),
    "a variant": ("fp16", "model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors"),
    "a variant of old": ("fp16", "model.safetensors.index.fp16.json", "model-0000{}-of-00002.fp16.safetensors"),
    "an index of old": ("fp16", "model.safetensors.fp16.index.json", "model.fp16-0000{}-of-00002.safetensors"),
    "pickles": (None, "pytorch_model.bin.index.json", "pytorch_model-0000{}-of-00002.bin"),
}


@pytest.mark.parametrize("what", SHARDED)
def test_shards_are_found_under_every_spelling(what: str) -> None:
    variant, index, shard = SHARDED[what]
    names = {index, shard.format(1), shard.format(2)}
    files = choose_weight_files(
        {*names, "other-00001-of-00002.safetensors", "config.json"}, TRANSFORMERS, variant, None, "here"
    )
    assert files.files[0] == index
    assert set(files.files) == names
    assert files.variant == variant


def test_plain_shards_are_not_taken_for_those_of_a_variant() -> None:
    names = {
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
        "model.fp16-00001-of-00001.safetensors",
    }
    files = choose_weight_files(names, TRANSFORMERS, None, None, "here")
    assert files.files == ("model.safetensors.index.json", "model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    "names", [set(), {"config.json"}, {"model-00001-of-00002.safetensors"}, {"x/model.safetensors"}]
)
def test_nothing_is_chosen_where_there_is_nothing(names: set[str]) -> None:
    with pytest.raises(MissingFile, match=r"here has no weights: looked for model\.safetensors and pytorch_model\.bin"):
        choose_weight_files(names, TRANSFORMERS, None, None, "here")


def test_variants_are_listed_of_whole_files_and_of_shards() -> None:
    assert variants_of(ALL, DIFFUSERS) == {"fp16", "non_ema"}
    assert variants_of({"model.bf16-00001-of-00002.safetensors"}, TRANSFORMERS) == {"bf16"}
    assert variants_of({"model-00001-of-00002.fp16.safetensors"}, TRANSFORMERS) == {"fp16"}
    assert variants_of({"model.safetensors", "model.fp16.onnx"}, TRANSFORMERS) == frozenset()


def test_what_belongs_to_a_save_is_told_from_what_does_not() -> None:
    mine = {
        "model.safetensors",
        "pytorch_model.bin",
        "model-00001-of-00003.safetensors",
        "model.safetensors.index.json",
    }
    other = {"model.fp16.safetensors", "config.json", "mymodel.safetensors", "model.safetensors.index.fp16.json"}
    assert {name for name in mine | other if is_weight_file(name, TRANSFORMERS, None)} == mine
    assert is_weight_file("model.safetensors.index.fp16.json", TRANSFORMERS, "fp16")
