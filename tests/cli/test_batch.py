"""``russet batch`` with the embedded model, in few steps."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from russet.cli.app import run

QUICK = ["--steps", "1", "--device", "cpu", "--width", "64", "--height", "64"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_line_is_generated_with_its_own_settings(here, capsys):
    lines = ["a cat", "", json.dumps({"prompt": "화성", "seed": 9, "width": 128, "output": "mars.png", "number": 2})]
    Path("prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    assert run(["batch", "prompts.txt", *QUICK, "--seed", "5"]) == 0
    assert capsys.readouterr().out == "russet-0001-seed5.png\nmars.png\nmars-0002.png\n"
    assert Image.open("mars-0002.png").size == (128, 64)


def test_a_line_that_fails_is_reported_and_the_others_go_on(here, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "a cat", "width": 65}\na dog\n'))
    assert run(["batch", "-", *QUICK, "--seed", "5", "--json"]) == 1
    shown = capsys.readouterr()
    assert "'a cat' failed: width must be divisible by 8" in shown.err
    (line,) = shown.out.splitlines()
    assert json.loads(line)["prompt"] == "a dog"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "no prompt"),
        ('a cat\n{"prompt": 3}', "line 2: prompt must be a text, not 3"),
        ('{"prompt": "a", "seed": true}', "line 1: seed must be a whole number, not true"),
        ('{"prompt": "a", "colour": 1}', "colour"),
        ('{"steps": 3}', "prompt is missing"),
        ('{"prompt": "a"', "line 1"),
        ('{"prompt": "a", "output": "a.gif"}', "a.png"),
    ],
)
def test_a_bad_line_is_an_error_before_anything_is_generated(here, capsys, text, hint):
    Path("prompts.txt").write_text(text)
    assert run(["batch", "prompts.txt", *QUICK]) == 2
    assert hint in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["prompts.txt"]


def test_a_missing_file_is_one_message(capsys):
    assert run(["batch", "none.txt"]) == 1
    assert "none.txt" in capsys.readouterr().err
