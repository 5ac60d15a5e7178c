"""``russet pull``, ``models`` and ``rm`` on a cache made here; the Hub itself is never asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"

Russet = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def russet(tmp_path) -> Russet:
    """The command in a process of its own, since huggingface_hub reads once, when imported, where its cache is."""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from russet.cli import main; main()", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def downloaded(cache: Path, name: str) -> None:
    """A repository in the cache, as huggingface_hub lays it out."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for part in (folder / "refs", folder / "blobs", snapshot):
        part.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs" / "aaaa").write_text("{}")
    (snapshot / "model_index.json").symlink_to(folder / "blobs" / "aaaa")


def test_models_are_listed_and_removed(russet, tmp_path):
    downloaded(tmp_path, "someone/pictures")
    downloaded(tmp_path, "someone/else")
    listed = russet("models")
    assert listed.returncode == 0, listed.stderr
    assert sorted(line.split()[0] for line in listed.stdout.splitlines()) == ["someone/else", "someone/pictures"]
    assert {(row["name"], row["bytes"]) for row in json.loads(russet("models", "--json").stdout)} == {
        ("someone/else", 2),
        ("someone/pictures", 2),
    }
    assert russet("rm", "someone/pictures").stdout.startswith("freed ")
    assert [line.split()[0] for line in russet("models").stdout.splitlines()] == ["someone/else"]


def test_an_empty_cache_says_how_to_fill_it(russet):
    done = russet("models")
    assert (done.returncode, done.stdout) == (0, "")
    assert "russet pull" in done.stderr


def test_what_is_not_there_cannot_be_removed(russet):
    done = russet("rm", "someone/else")
    assert done.returncode == 1
    assert "someone/else" in done.stderr


@pytest.mark.parametrize(("model", "code"), [("someone/pictures", 1), ("no id", 2)])
def test_a_model_that_cannot_be_had_is_one_message(russet, model, code):
    done = russet("pull", model)
    assert done.returncode == code
    assert model in done.stderr
    assert "Traceback" not in done.stderr
