from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from russet.checkpoints.formats.opening import open_shards, open_weights, plain_name
from russet.checkpoints.formats.tensor_source import Derived
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
    assert weights.nbytes == 2 * 4 + 3 * 4 + 4 * 8


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "a\\b", "C:x", "..", ".", "", "a\0b"])
def test_a_shard_outside_of_the_folder_is_refused(name: str, sharded: Any) -> None:
    with pytest.raises(UnsafeFile, match="without a folder"):
        open_shards(sharded(weight_map={"a": name}))
    with pytest.raises(UnsafeFile):
        plain_name(name, "here")


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
    third = Derived(origin, (2,), lambda value: value[2:4])
    assert torch.equal(third.read(), torch.tensor([2.0, 3.0]))
