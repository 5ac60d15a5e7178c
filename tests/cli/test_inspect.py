"""``russet inspect`` on the embedded model and on pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import russet
from russet.cli.app import run
from russet.images import png
from russet.images.png import KEY, Parameters

MINI = Path(russet.__file__).parent / "mini"


def test_a_pipeline_is_told_in_words(capsys):
    assert run(["inspect", "mini"]) == 0
    shown = capsys.readouterr().out
    for text in ("unet:", "10.6 million parameters, float16", "StableDiffusionPipeline", "v_prediction"):
        assert text in shown


def test_a_pipeline_is_told_in_json(capsys):
    assert run(["inspect", str(MINI), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {part["name"] for part in report["parts"]} >= {"unet", "vae", "text_encoder"}


def test_memory_is_predicted_for_a_size(capsys):
    assert run(["inspect", "mini", "--size", "256x256", "--device", "cpu"]) == 0
    assert "GB for 256x256 on" in capsys.readouterr().out
    assert run(["inspect", "mini", "--size", "256x256", "--json", "--device", "cpu"]) == 0
    assert "GB for 256x256 on" in json.loads(capsys.readouterr().out)["memory"]
    assert run(["inspect", "mini", "--size", "big"]) == 2
    assert run(["inspect", str(MINI / "vae"), "--size", "256x256"]) == 2


def test_a_weight_file_is_told_without_its_weights(capsys):
    assert run(["inspect", str(MINI / "vae" / "diffusion_pytorch_model.safetensors")]) == 0
    assert "vae" in capsys.readouterr().out


def test_a_picture_says_how_it_was_made(tmp_path, capsys):
    made = Parameters("a cat", "blurry", {"Steps": "20", "Seed": "4", "Size": "8x8"})
    path = png.save_as(Image.new("RGB", (8, 8)), tmp_path / "cat.png", {KEY: made.to_text()})
    assert run(["inspect", str(path)]) == 0
    assert capsys.readouterr().out == made.to_text() + "\n"
    assert run(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["Seed"] == "4"


@pytest.mark.parametrize(
    ("name", "content"), [("a.png", b"no picture"), ("b.safetensors", b"no weights"), ("c.bin", b"")]
)
def test_a_damaged_file_is_one_message(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    assert run(["inspect", str(tmp_path / name)]) in (1, 2)
    err = capsys.readouterr().err
    assert name in err
    assert "Traceback" not in err


def test_a_picture_without_the_text_and_a_missing_file_are_one_message(tmp_path, capsys):
    path = png.save_as(Image.new("RGB", (8, 8)), tmp_path / "cat.png")
    assert run(["inspect", str(path)]) == 2
    assert "does not say how it was made" in capsys.readouterr().err
    assert run(["inspect", str(tmp_path / "none.png")]) == 2
    assert run(["inspect", str(tmp_path / "none")]) in (1, 2)
