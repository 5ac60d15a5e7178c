"""``russet "a prompt"`` with the embedded model, in few steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import russet
from russet.cli.app import run
from russet.images.png import Parameters

PROMPT = "a photo of an astronaut riding a horse on mars"
QUICK = ["--steps", "2", "--device", "cpu"]
SMALL = [*QUICK, "--width", "64", "--height", "64"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_prompt_becomes_a_picture(here, capsys):
    assert run([PROMPT, *QUICK, "--seed", "42"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "russet-0001-seed42.png\n"
    assert "demo model" in shown.err
    assert "--model stable-diffusion-v1-5/stable-diffusion-v1-5" in shown.err
    assert "seed 42 · 256×256 · cpu, float32" in shown.err
    for phase in ("start", "load", "text", "denoise", "decode"):
        assert f"{phase} " in shown.err
    with Image.open(here / "russet-0001-seed42.png") as image:
        assert image.size == (256, 256)
        assert np.asarray(image).std() > 5
        made = Parameters.of_text(image.text["parameters"])
    assert made.prompt == PROMPT
    assert made.settings == {
        "Steps": "2",
        "Sampler": "DDIM",
        "CFG scale": "5.0",
        "Seed": "42",
        "Size": "256x256",
        "Model": "mini",
        "Version": f"Russet {russet.__version__}",
    }


def test_the_same_seed_is_the_same_picture_and_no_file_is_overwritten(here):
    for seed in ("7", "7", "8"):
        assert run([PROMPT, *SMALL, "--seed", seed, "-q"]) == 0
    assert pictures(here) == ["russet-0001-seed7.png", "russet-0002-seed7.png", "russet-0003-seed8.png"]
    one, two, three = (np.asarray(Image.open(path)) for path in sorted(here.iterdir()))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)


def test_a_sampler_is_chosen_by_name_and_reported(here, capsys):
    assert run([PROMPT, *SMALL, "--seed", "1", "--sampler", "DPM++ 2M Karras", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sampler"] == "DPM++ 2M Karras"
    with Image.open(report["images"][0]["path"]) as image:
        assert Parameters.of_text(image.text["parameters"]).settings["Sampler"] == "DPM++ 2M Karras"


def test_samplers_lists_names_that_work(capsys):
    from russet.schedulers import names

    assert run(["samplers"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.split("\n\n")[0].splitlines()]
    assert listed == russet.list_samplers()
    for name in listed:
        assert names.title(names.make(name)) == names.SAMPLERS[name].title


def test_several_pictures_have_several_seeds_and_the_report_is_json(here, capsys):
    arguments = ["generate", "info", "-n", "blurry, grey", "--number", "2", "--seed", "5", "--guidance", "3"]
    assert run([*arguments, "--width", "128", "--height", "192", "-o", "out/cat.png", "--json", *QUICK]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    report = json.loads(shown.out)
    assert report["images"] == [
        {"path": os.path.join("out", "cat.png"), "seed": 5},
        {"path": os.path.join("out", "cat-0002.png"), "seed": 6},
    ]
    assert (report["width"], report["height"], report["guidance"], report["prompt"]) == (128, 192, 3.0, "info")
    assert set(report["seconds"]) == {"start", "load", "text", "denoise", "decode"}
    with Image.open(here / "out" / "cat-0002.png") as image:
        assert image.size == (128, 192)
        made = Parameters.of_text(image.text["parameters"])
    assert (made.prompt, made.negative_prompt, made.settings["Seed"]) == ("info", "blurry, grey", "6")


def test_a_seed_left_out_is_random_and_in_the_file_name(here):
    for _ in range(2):
        assert run([PROMPT, *SMALL, "-q"]) == 0
    one, two = pictures(here)
    assert one.split("seed")[1] != two.split("seed")[1]


def test_quiet_prints_the_path_alone(capsys):
    assert run([PROMPT, *SMALL, "-q", "--seed", "1"]) == 0
    assert capsys.readouterr() == ("russet-0001-seed1.png\n", "")


def test_a_long_prompt_prints_a_warning(capsys):
    assert run(["a cat and " * 40, *SMALL]) == 0
    assert "warning: the prompt is longer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        (["--sampler", "dpmpp_2m_kras"], 2, "dpmpp_2m_karras"),
        (["--width", "250"], 2, "divisible by 8"),
        (["--model", "no/such/folder"], 1, "no/such/folder"),
        (["--model", "none.safetensors"], 1, "none.safetensors"),
        (["--device", "tpu"], 2, "tpu"),
        (["--guidance", "nan"], 2, "guidance"),
        (["-o", "file/under/a/file"], 1, "not a folder"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(here, capsys, words, code, hint):
    (here / "file").write_text("x")
    assert run([PROMPT, "--steps", "2", *words]) == code
    err = capsys.readouterr().err
    assert hint in err
    assert "Traceback" not in err
    assert pictures(here) == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_ends_with_130_and_leaves_nothing(here, tmp_path_factory):
    code, look = "from russet.cli import main; main()", tmp_path_factory.mktemp("preview") / "look.png"
    process = subprocess.Popen(
        [sys.executable, "-c", code, PROMPT, *SMALL, "--steps", "999", "--preview", str(look)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # what a shell puts into the background ignores Ctrl-C, and so would everything that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        while not look.exists():  # it exists while the images are generated
            assert process.poll() is None, "it ended before it could be interrupted"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert "interrupted" in err
    assert "Traceback" not in err
    assert pictures(here) == []


def test_leaving_work_out_is_written_into_the_picture(here, capsys):
    less = ["--guidance-interval", "0", "0.9", "--deep-cache", "2"]
    assert run([PROMPT, *SMALL, *less, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["guidance_interval"], report["deep_cache"]) == ([0.0, 0.9], 2)
    with Image.open(report["images"][0]["path"]) as image:
        settings = Parameters.of_text(image.text["parameters"]).settings
    assert (settings["CFG interval"], settings["Deep cache"]) == ("0.0-0.9", "2")
    assert run([PROMPT, *SMALL, "--guidance-interval", "0.9", "0.1"]) == 2
    assert "guidance_interval" in capsys.readouterr().err


def test_a_preview_shows_all_pictures_while_they_are_generated(here, capsys):
    (here / "look.png").write_bytes(b"what was there before")
    assert run([PROMPT, *SMALL, "--number", "2", "--preview", "look.png", "-q"]) == 0
    with Image.open(here / "look.png") as image:
        assert image.size == (128, 64)
        assert np.asarray(image).std() > 5
    assert len(pictures(here)) == 3
    assert run([PROMPT, *SMALL, "--preview", "look.jpg"]) == 2
    assert "look.png" in capsys.readouterr().err
