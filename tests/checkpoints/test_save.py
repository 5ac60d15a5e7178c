"""Folders that Russet writes: complete, or as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from russet.checkpoints import load, save
from russet.checkpoints.atomic_directory import atomic_directory
from russet.checkpoints.formats import writing
from russet.checkpoints.formats.weight_files import open_weights
from russet.checkpoints.formats.writing import read_size, write_safetensors
from russet.errors import ArgumentTypeError, CheckpointError, ConfigError, InputError


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> load.Loaded:
    return load.pipeline(tiny_folder)


@pytest.fixture
def write(loaded: load.Loaded, tmp_path: Path) -> Any:
    """Saves the tiny pipeline into a new folder, or the one that is given."""

    def written(folder: Path | None = None, **options: Any) -> Path:
        folder = folder or tmp_path / "saved"
        save.pipeline(folder, loaded.class_name, loaded.components, loaded.index, **options)
        return folder

    return written


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_weights(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


NETWORKS = ("unet", "vae", "text_encoder", "safety_checker")


def test_what_is_saved_loads_bit_equal(write: Any, loaded: load.Loaded) -> None:
    again = load.pipeline(write())
    for part in NETWORKS:
        assert same_weights(again.components[part], loaded.components[part]), part
        assert again.components[part].config == loaded.components[part].config
    assert again.components["scheduler"].config == loaded.components["scheduler"].config
    assert again.components["tokenizer"]("a cat").input_ids.equal(loaded.components["tokenizer"]("a cat").input_ids)
    assert dict(again.index) == {**loaded.index, "feature_extractor": ["transformers", "CLIPImageProcessor"]}


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_load_as_the_whole_does(safe: bool, variant: str | None, write: Any, loaded: load.Loaded) -> None:
    folder = write(max_shard_size="100KB", safe_serialization=safe, variant=variant)
    assert len(list((folder / "unet").iterdir())) > 3
    sizes = [path.stat().st_size for path in (folder / "vae").iterdir() if "-of-" in path.name]
    assert max(sizes) < 200_000  # a tensor larger than a shard would have one of its own; none is
    again = load.pipeline(folder, options=load.Options(variant=variant))
    assert all(same_weights(again.components[part], loaded.components[part]) for part in NETWORKS)


def test_an_index_gives_the_size_and_the_place_of_every_tensor(write: Any, loaded: load.Loaded) -> None:
    folder = write(max_shard_size="100KB") / "unet"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    state = loaded.components["unet"].state_dict()
    assert index["metadata"]["total_size"] == sum(value.numel() * 4 for value in state.values())
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(folder / shard)[name], state[name])


def test_weights_of_an_earlier_save_do_not_stay_behind(write: Any) -> None:
    folder = write(max_shard_size="100KB")
    other = folder / "unet" / "diffusion_pytorch_model.bf16.safetensors"
    other.write_bytes(b"another variant")
    write(folder)
    assert {path.name for path in (folder / "unet").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        other.name,
    }
    write(folder, safe_serialization=False)
    assert not (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()


def test_unknown_keys_and_where_a_config_came_from_are_kept(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "in")
    added = {"new_feature": [1, {"a": None}], "_name_or_path": "someone/model", "_diffusers_version": "0.6.0"}
    names = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json")
    for name in names:
        path = tmp_path / "in" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **added}))
    loaded = load.pipeline(tmp_path / "in")
    save.pipeline(tmp_path / "out", loaded.class_name, loaded.components, loaded.index)
    for name in names:
        data = json.loads((tmp_path / "out" / name).read_text())
        assert {key: data[key] for key in added} == added, name


def test_a_scheduler_that_was_exchanged_is_saved_as_what_it_is(loaded: load.Loaded, tmp_path: Path) -> None:
    from russet.schedulers.named import EulerDiscreteScheduler

    euler = EulerDiscreteScheduler.from_config(loaded.components["scheduler"].config)
    save.pipeline(tmp_path / "out", loaded.class_name, {**loaded.components, "scheduler": euler}, loaded.index)
    assert json.loads((tmp_path / "out/model_index.json").read_text())["scheduler"][1] == "EulerDiscreteScheduler"
    config = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert config["_class_name"] == "EulerDiscreteScheduler"
    assert config["beta_end"] == 0.012


def test_components_that_are_none_are_written_as_absent(loaded: load.Loaded, tmp_path: Path) -> None:
    save.pipeline(tmp_path / "x", loaded.class_name, {**loaded.components, "safety_checker": None}, loaded.index)
    assert json.loads((tmp_path / "x/model_index.json").read_text())["safety_checker"] == [None, None]
    assert not (tmp_path / "x" / "safety_checker").exists()


def test_a_component_saves_itself(loaded: load.Loaded, tmp_path: Path) -> None:
    loaded.components["vae"].save_pretrained(tmp_path / "vae")
    again = load.component(type(loaded.components["vae"]), tmp_path / "vae")
    assert same_weights(again, loaded.components["vae"])


def test_weights_in_another_memory_order_are_saved_as_they_read(loaded: load.Loaded, tmp_path: Path) -> None:
    vae = load.pipeline(loaded.source).components["vae"].to(memory_format=torch.channels_last)
    vae.save_pretrained(tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(state[name], value) for name, value in loaded.components["vae"].state_dict().items())


def test_the_precision_is_written_where_transformers_looks_for_it(tiny_folder: Path, tmp_path: Path) -> None:
    encoder = load.pipeline(tiny_folder, dtype=torch.float16).components["text_encoder"]
    encoder.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["dtype"] == "float16"
    assert data["architectures"] == ["CLIPTextModel"]


# -- whatever happens, the old files are intact and nothing half-written stays


def spoil(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    """Lets writing a weight file fail in the middle, after some have been written."""

    calls = []

    def failing(path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) > after:
            path.write_bytes(b"half of it")
            raise error
        write_safetensors(path, *rest)

    monkeypatch.setattr(writing, "write_safetensors", failing)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 2])
def test_a_save_that_fails_leaves_the_old_folder_as_it_was(
    error: BaseException, after: int, write: Any, loaded: load.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(max_shard_size="100KB")
    before = files(folder)
    spoil(monkeypatch, error, after)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        write(folder)
    assert files(folder) == before
    assert not list(folder.glob(".*"))


def test_a_save_that_fails_into_a_new_folder_leaves_none(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, OSError(28, "No space left on device"), 1)
    with pytest.raises(CheckpointError):
        write(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", range(1, 6))
def test_an_interruption_between_two_moves_moves_all_back(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "x"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "one").write_text("old")
    (folder / "two").write_text("old")
    before = files(folder)
    replace = os.replace
    calls = []

    def interrupted(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == number:
            raise KeyboardInterrupt
        replace(source, target)

    with pytest.raises(KeyboardInterrupt), atomic_directory(folder, 0) as stage:  # noqa: PT012
        for name in ("a/one", "b/three", "two"):
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_text("new")
        monkeypatch.setattr(os, "replace", interrupted)
    monkeypatch.undo()
    assert files(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == ["a", "two"]


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="GB, and the disk has"), atomic_directory(tmp_path / "x", 1 << 60):
        raise AssertionError("began to write")
    assert not (tmp_path / "x").exists()


def test_a_file_in_the_place_of_the_folder_is_told(write: Any, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a file")
    with pytest.raises(CheckpointError, match="is a file"):
        write(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "a file"


def test_a_folder_that_may_not_be_written_is_told(write: Any, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        target = Path("/proc/russet")  # where even root may not
    else:
        tmp_path.chmod(0o500)
        target = tmp_path / "x"
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(target)


def test_readers_see_old_or_new_files_and_never_a_part(loaded: load.Loaded, tmp_path: Path) -> None:
    vae = loaded.components["vae"]
    vae.save_pretrained(tmp_path)
    stop = threading.Event()
    broken: list[Exception] = []

    def read() -> None:
        try:
            load_file(tmp_path / "diffusion_pytorch_model.safetensors")
        except FileNotFoundError:
            pass  # between the two renames that allow going back
        except Exception as error:
            broken.append(error)

    def read_on() -> None:
        while not stop.is_set():
            read()

    reader = threading.Thread(target=read_on)
    reader.start()
    for _ in range(5):
        vae.save_pretrained(tmp_path)
    stop.set()
    reader.join()
    assert not broken


# -- arguments


@pytest.mark.parametrize(
    ("size", "expected"),
    [(10, 10), ("10GB", 10**10), ("5 MB", 5 * 10**6), ("1GiB", 1 << 30), ("200kb", 200_000), ("7", 7)],
)
def test_shard_sizes_are_read(size: int | str, expected: int) -> None:
    assert read_size(size) == expected


@pytest.mark.parametrize("size", ["", "big", "-1GB", "1.5GB", "10 TB", "9" * 50, 0, -5])
def test_a_wrong_shard_size_is_refused(size: Any, write: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_shard_size"):
        write(tmp_path / "x", max_shard_size=size)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_shard_size", 1.5), ("max_shard_size", True), ("safe_serialization", "yes"), ("variant", 3)],
)
def test_an_argument_of_a_wrong_type_is_refused(name: str, value: Any, write: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=name):
        write(**{name: value})


@pytest.mark.parametrize("folder", [None, 3, "", b"x"])
def test_a_folder_must_be_named(folder: Any, loaded: load.Loaded) -> None:
    with pytest.raises(ArgumentTypeError, match="folder"):
        save.pipeline(folder, loaded.class_name, loaded.components, loaded.index)


def test_a_component_of_another_library_is_refused_before_writing(loaded: load.Loaded, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Linear is not a component"):
        save.pipeline(tmp_path / "x", "X", {**loaded.components, "unet": torch.nn.Linear(1, 1)}, {})
    assert not (tmp_path / "x").exists()


def test_tensors_of_every_type_are_written_as_safetensors_reads_them(tmp_path: Path) -> None:
    state = {
        "half": torch.randn(3).half(),
        "bfloat": torch.randn(2, 2).bfloat16(),
        "long": torch.arange(5),
        "bool": torch.tensor([True]),
        "double": torch.randn(4).double(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5),
        "transposed": torch.randn(3, 4).t(),
        "이름": torch.ones(1),
    }
    write_safetensors(tmp_path / "x.safetensors", state, {"format": "pt"})
    read = load_file(tmp_path / "x.safetensors")
    assert set(read) == set(state)
    for name, value in state.items():
        assert read[name].dtype == value.dtype
        assert read[name].shape == value.shape
        assert torch.equal(read[name].float(), value.float())


@pytest.mark.parametrize("title", ["x", "x" * 31])
def test_what_was_saved_lies_at_cache_lines(title: str, loaded: load.Loaded, tmp_path: Path) -> None:
    """So that it can be used where it is mapped; the few tensors that do not fill whole lines come last."""
    write_safetensors(tmp_path / "x.safetensors", {title: torch.ones(3), **loaded.components["unet"].state_dict()}, {})
    tensors = open_weights(tmp_path / "x.safetensors").tensors.values()
    assert all(tensor.offset % 64 == 0 or tensor.nbytes % 64 for tensor in tensors)
    assert any(tensor.nbytes % 64 for tensor in tensors)
