"""``russet pull``, ``models`` and ``rm`` on a cache made here; the Hub itself is never asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from russet.cli.app import run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache that huggingface_hub and Russet look into, without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def downloaded(cache: Path, name: str) -> None:
    """A repository in the cache, as huggingface_hub lays it out."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for part in (folder / "refs", folder / "blobs", snapshot):
        part.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs" / "aaaa").write_text("{}")
    (snapshot / "model_index.json").symlink_to(folder / "blobs" / "aaaa")


def test_models_are_listed_and_removed(cache, capsys):
    downloaded(cache, "someone/pictures")
    assert run(["models"]) == 0
    assert capsys.readouterr().out.startswith("someone/pictures ")
    assert run(["models", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["bytes"]) == ("someone/pictures", 2)
    assert run(["rm", "someone/pictures"]) == 0
    assert "freed" in capsys.readouterr().out
    assert run(["models"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "no model is downloaded" in shown.err


def test_what_is_not_there_cannot_be_removed(cache, capsys):
    assert run(["rm", "someone/else"]) == 1
    assert "someone/else" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "code"), [("someone/pictures", 1), ("no id", 2)])
def test_a_model_that_cannot_be_had_is_one_message(cache, capsys, model, code):
    assert run(["pull", model]) == code
    err = capsys.readouterr().err
    assert model in err
    assert "Traceback" not in err
