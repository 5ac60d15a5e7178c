"""What names a single file: a path, an address on the Hub, or owner/name/file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from russet.checkpoints import load
from russet.checkpoints.arguments import Options
from russet.checkpoints.single_file.load import single_file
from russet.checkpoints.single_file.locate import HubFile, hub_file, locate_file
from russet.checkpoints.single_file.save import save_single_file
from russet.errors import ArgumentTypeError, InputError, MissingFile

from ..hub_server import HubServer


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("https://huggingface.co/o/n/blob/main/a.safetensors", HubFile("o/n", "a.safetensors", "main")),
        ("https://huggingface.co/o/n/resolve/fp16/x/a.ckpt?download=true", HubFile("o/n", "x/a.ckpt", "fp16")),
        ("https://hf.co/o/n/blob/main/my%20model.safetensors", HubFile("o/n", "my model.safetensors", "main")),
        ("https://hf.co/o/n/blob/refs%2Fpr%2F1/a.safetensors", HubFile("o/n", "a.safetensors", "refs/pr/1")),
        ("https://hf.co/o/n/blob/refs/pr/12/a.safetensors", HubFile("o/n", "a.safetensors", "refs/pr/12")),
        ("huggingface.co/o/n/blob/main/a.safetensors", HubFile("o/n", "a.safetensors", "main")),
        ("o/n/a.safetensors", HubFile("o/n", "a.safetensors")),
        ("o/n/sub/a.ckpt", HubFile("o/n", "sub/a.ckpt")),
        ("o/n", None),
        ("a.safetensors", None),
        ("folder/a.safetensors", None),
        ("./o/n/a.safetensors", None),
        ("../o/n/a.safetensors", None),
        ("/o/n/a.safetensors", None),
        ("o/n/../../a.safetensors", None),
        ("o/n/a.txt", None),
    ],
)
def test_an_address_means_a_file_in_a_repository(name: str, found: HubFile | None) -> None:
    assert hub_file(name) == found


@pytest.mark.parametrize(
    "name",
    [
        "https://civitai.com/api/download/models/1",
        "ftp://huggingface.co/o/n/blob/main/a.safetensors",
        "https://huggingface.co/o/n",
        "https://huggingface.co/o/n/tree/main/a.safetensors",
        "https://huggingface.co/o/n/blob/main/../../a.safetensors",
        "https://huggingface.co.evil.org/o/n/blob/main/a.safetensors",
        "https://huggingface.co/o/n/blob/main/%2e%2e/a.safetensors",
    ],
)
def test_an_address_of_anything_else_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        hub_file(name)


def test_a_file_that_is_here_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o" / "n").mkdir(parents=True)
    (tmp_path / "o" / "n" / "a.safetensors").write_bytes(b"x")
    assert locate_file("o/n/a.safetensors", Options()) == Path("o/n/a.safetensors")
    assert locate_file(Path("o/n/a.safetensors"), Options()) == Path("o/n/a.safetensors")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("", InputError),
        ("a\0b", InputError),
        ("x" * 5000, InputError),
        (b"a.safetensors", ArgumentTypeError),
        (None, ArgumentTypeError),
        ("nowhere.safetensors", MissingFile),
        (Path("o/n/a.safetensors"), MissingFile),
    ],
)
def test_what_names_no_file_is_refused(source: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        locate_file(source, Options())  # type: ignore[arg-type]


def test_two_revisions_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InputError, match="revision"):
        locate_file("https://huggingface.co/o/n/blob/main/a.safetensors", Options(revision="fp16"))


def test_a_file_on_the_hub_is_fetched_alone_and_its_configs_without_weights(
    hub: HubServer, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "folder")
    save_single_file(load.pipeline(tiny_folder).components, tmp_path / "folder" / "model.safetensors")
    hub.add("someone/tiny", tmp_path / "folder")
    loaded = single_file("someone/tiny/model.safetensors", config="someone/tiny")
    assert loaded.components["tokenizer"].vocab_size == 2944
    assert {name for name in hub.fetched() if name.endswith((".safetensors", ".bin"))} == {"model.safetensors"}
    address = "https://huggingface.co/someone/tiny/blob/main/model.safetensors"
    assert locate_file(address, Options()).name == "model.safetensors"
    with pytest.raises(MissingFile, match=r"model\.safetensors"):
        locate_file("someone/tiny/other.safetensors", Options())
