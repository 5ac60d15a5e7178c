"""Weight files held open and mapped: what is copied, what is shared, and what happens when the file changes."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from russet.checkpoints.formats import tensor_source
from russet.checkpoints.formats.tensor_source import StoredTensor
from russet.checkpoints.formats.weight_files import open_weights
from russet.errors import CheckpointError, CorruptFile, MissingFile

STATE = {"a": torch.arange(1000.0), "b": torch.arange(1000.0).half(), "odd": torch.ones(3, dtype=torch.int8)}

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(STATE, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def tensors_in(path: Path) -> Mapping[str, StoredTensor]:
    return open_weights(path).tensors


def mappings(path: Path) -> int:
    """How often the file is mapped into this process."""
    return sum(line.endswith(str(path.resolve())) for line in Path("/proc/self/maps").read_text().splitlines())


def descriptors(path: Path) -> int:
    """How often this process has the file open, mappings included."""
    return [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()].count(str(path.resolve()))


@on_linux
def test_a_file_is_mapped_once_and_let_go(path: Path) -> None:
    tensors = tensors_in(path)
    values = {name: tensor.read() for name, tensor in tensors.items()}
    assert all(torch.equal(value, STATE[name]) for name, value in values.items())
    assert len({values[name].data_ptr() - tensors[name].offset for name in values}) == 1  # parts of one mapping
    assert mappings(path) == 1
    del values, tensors
    gc.collect()
    assert (mappings(path), descriptors(path)) == (0, 0)


@on_linux
def test_what_is_copied_at_once_is_let_go_tensor_by_tensor(path: Path) -> None:
    tensors = tensors_in(path)
    for _ in range(2):
        value = tensors["b"].read(brief=True)
        assert torch.equal(value, STATE["b"])
        assert mappings(path) == 1
        del value
        assert mappings(path) == 0
    assert descriptors(path) == 1


@on_linux
def test_descriptors_do_not_grow_with_the_number_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    save_file({str(number): torch.ones(4) for number in range(300)}, path)
    values = [tensor.read() for tensor in tensors_in(path).values()]
    assert len(values) == 300
    assert descriptors(path) <= 2


def test_what_is_written_to_a_tensor_stays_there(path: Path) -> None:
    before = path.read_bytes()
    for brief in (False, True):
        mine, other = (open_weights(path).tensors["a"].read(brief=brief) for _ in range(2))
        mine.zero_()
        assert float(mine.sum()) == 0
        assert torch.equal(other, STATE["a"])
    assert path.read_bytes() == before
    assert torch.equal(tensors_in(path)["a"].read(), STATE["a"])


def test_what_was_read_outlives_the_file(path: Path) -> None:
    tensors = tensors_in(path)
    value = tensors["a"].read()
    path.unlink()
    assert torch.equal(value, STATE["a"])
    assert torch.equal(tensors["b"].read(), STATE["b"])


def test_a_file_that_took_the_name_is_not_read_in_place_of_the_one_that_was_opened(path: Path) -> None:
    tensors = tensors_in(path)
    save_file({"a": torch.zeros(1000)}, path.with_name("new"))
    path.with_name("new").replace(path)
    assert torch.equal(tensors["a"].read(), STATE["a"])
    assert float(tensors_in(path)["a"].read().sum()) == 0


def test_a_file_that_is_rewritten_in_place_is_noticed(path: Path) -> None:
    tensors = tensors_in(path)
    other = path.with_name("other")
    save_file({**STATE, "c": torch.zeros(2)}, other)
    path.write_bytes(other.read_bytes())
    for brief in (False, True):
        with pytest.raises(CorruptFile, match="changed while"):
            tensors["a"].read(brief=brief)


def test_a_file_that_is_cut_short_is_noticed_before_it_is_mapped(path: Path) -> None:
    tensors = tensors_in(path)
    os.truncate(path, 100)
    with pytest.raises(CorruptFile, match="changed while"):
        tensors["a"].read()


def test_values_that_are_not_aligned_are_copied(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"a": torch.arange(8.0)}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    tensor = tensors_in(path)["a"]
    assert tensor.offset % 4 == 1
    assert torch.equal(tensor.read(), torch.arange(8.0))
    os.truncate(path, 0)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError):
        tensor.read()


def test_where_files_cannot_be_held_they_are_copied_and_a_change_is_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_source, "KEEP_OPEN", False)
    tensors = tensors_in(path)
    values = {name: tensor.read() for name, tensor in tensors.items()}
    os.truncate(path, 0)
    assert all(torch.equal(value, STATE[name]) for name, value in values.items())
    with pytest.raises(CorruptFile, match="changed while"):
        tensors["a"].read()
    path.unlink()
    with pytest.raises(MissingFile, match="cannot be opened"):
        tensors["a"].read()


def test_a_file_that_cannot_be_mapped_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object, **__: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr(tensor_source.mmap, "mmap", cannot)
    for brief in (False, True):
        assert all(torch.equal(tensor.read(brief=brief), STATE[name]) for name, tensor in tensors_in(path).items())


def test_descriptions_of_tensors_can_be_copied_and_sent_elsewhere(path: Path) -> None:
    tensors = dict(tensors_in(path))
    for again in (copy.deepcopy(tensors), pickle.loads(pickle.dumps(tensors))):
        assert all(torch.equal(tensor.read(), STATE[name]) for name, tensor in again.items())
