from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from russet.checkpoints.arguments import MINI, Options, is_hub_id, locate, precision_of, read_dtype
from russet.errors import ArgumentTypeError, InputError, MissingFile, UnsupportedArgument


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("variant", 16),
        ("revision", b"main"),
        ("cache_dir", 3),
        ("local_files_only", "yes"),
        ("local_files_only", 1),
        ("token", 5),
        ("force_download", None),
        ("use_safetensors", "true"),
    ],
)
def test_an_option_of_a_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"{name} must be .*, not {type(value).__name__}"):
        Options(**{name: value})


@pytest.mark.parametrize("variant", ["", "../x", "a/b", "fp16.", "a b", "변형"])
def test_a_variant_that_is_no_word_is_refused(variant: str) -> None:
    with pytest.raises(InputError, match="variant"):
        Options(variant=variant)


@pytest.mark.parametrize("revision", ["", "..", "../main", "refs/../../x", "/main", "a//b"])
def test_a_revision_that_leads_elsewhere_is_refused(revision: str) -> None:
    with pytest.raises(InputError, match="revision"):
        Options(revision=revision)


def test_a_revision_may_have_slashes() -> None:
    assert Options(revision="refs/pr/1").revision == "refs/pr/1"


def test_contradicting_options_are_refused() -> None:
    with pytest.raises(InputError, match="both"):
        Options(local_files_only=True, force_download=True)


def test_unknown_options_are_refused_with_those_there_are() -> None:
    with pytest.raises(UnsupportedArgument, match=r"low_cpu_mem_usage: no such argument; there are .*variant"):
        Options.of({"low_cpu_mem_usage": True})
    assert Options.of({"variant": "fp16", "cache_dir": Path("x")}).variant == "fp16"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.float16, torch.float16),
        ("float16", torch.float16),
        ("half", torch.float16),
        ("fp16", torch.float16),
        ("torch.bfloat16", torch.bfloat16),
        ("float32", torch.float32),
        (None, None),
    ],
)
def test_a_precision_is_read_under_either_name(value: Any, expected: torch.dtype | None) -> None:
    assert read_dtype(dtype=value) == expected
    assert read_dtype(torch_dtype=value) == expected
    assert read_dtype(torch_dtype=value, dtype=value) == expected


@pytest.mark.parametrize("value", ["auto", "int8", "float", "", torch.int8, torch.uint8, torch.complex64])
def test_a_precision_that_models_cannot_have_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="models cannot be in"):
        read_dtype(dtype=value)


@pytest.mark.parametrize("value", [16, 1.5, ["float16"], float])
def test_what_is_no_precision_is_refused_by_its_type(value: Any) -> None:
    with pytest.raises(ArgumentTypeError):
        read_dtype(torch_dtype=value)


def test_two_different_precisions_contradict_each_other() -> None:
    with pytest.raises(InputError, match="contradict"):
        read_dtype(torch_dtype="float16", dtype=torch.float32)


def test_a_precision_by_component_has_a_default() -> None:
    by_part = {"vae": torch.float32, "default": torch.float16}
    assert [precision_of(by_part, part) for part in ("vae", "unet")] == [torch.float32, torch.float16]
    assert precision_of({"vae": torch.float16}, "unet") == torch.float32
    assert precision_of(None, "unet") == torch.float32
    assert precision_of(torch.bfloat16, "unet") == torch.bfloat16
