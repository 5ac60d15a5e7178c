from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from russet.checkpoints.locate import MINI, is_hub_id, locate
from russet.errors import ArgumentTypeError, InputError, MissingFile


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_mini_is_the_embedded_model() -> None:
    assert locate("mini") == MINI
    assert (MINI / "model_index.json").is_file()


def test_a_folder_that_exists_wins_over_a_repository() -> None:
    Path("owner/name").mkdir(parents=True)
    assert locate("owner/name") == Path("owner/name")
    assert locate("owner/other") == "owner/other"


def test_a_folder_named_mini_wins_only_if_it_holds_a_model() -> None:
    Path("mini").mkdir()
    assert locate("mini") == MINI
    Path("mini/model_index.json").write_text("{}")
    assert locate("mini") == Path("mini")


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert locate("~/models") == tmp_path / "models"


@pytest.mark.parametrize("name", ["stable-diffusion-v1-5/stable-diffusion-v1-5", "a/b", "A_1/b.c-d"])
def test_hub_ids_are_recognised(name: str) -> None:
    assert is_hub_id(name)
    assert locate(name) == name


@pytest.mark.parametrize(
    "name",
    ["a", "a/b/c", "a//b", "/b", "a/", "a/b..c", "a--x/b", "-a/b", "a/b.git", "a b/c", "한/글", "a/" + "b" * 100],
)
def test_what_is_no_hub_id_is_looked_for_as_a_folder(name: str) -> None:
    assert not is_hub_id(name)
    with pytest.raises(MissingFile, match="Hub id"):
        locate(name)


@pytest.mark.parametrize(
    ("name", "error", "hint"),
    [
        ("", InputError, "owner/name"),
        ("  ", InputError, "owner/name"),
        ("a\0b", InputError, "names no model"),
        ("x" * 5000, InputError, "cannot be a path"),
        ("mimi", MissingFile, "no folder of that name is in"),
        ("./nothing", MissingFile, "there is no folder"),
        ("models/x.safetensors", MissingFile, "from_single_file"),
        ("https://huggingface.co/a/b", InputError, "owner/name"),
    ],
)
def test_a_wrong_name_is_told_what_was_looked_for(name: str, error: type[Exception], hint: str) -> None:
    with pytest.raises(error, match=hint):
        locate(name)


def test_a_single_file_is_sent_to_from_single_file() -> None:
    Path("x.safetensors").write_bytes(b"")
    for source in ("x.safetensors", Path("x.safetensors")):
        with pytest.raises(InputError, match="from_single_file"):
            locate(source)


def test_a_path_object_is_never_a_repository() -> None:
    with pytest.raises(MissingFile):
        locate(Path("owner/name"))


@pytest.mark.parametrize("source", [None, 3, b"mini", ["mini"], {}])
def test_what_is_no_name_is_refused_by_its_type(source: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=type(source).__name__):
        locate(source)
