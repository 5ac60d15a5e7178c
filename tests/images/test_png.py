"""PNG files, and the ``parameters`` text in them."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from russet.errors import InputError, OutputError
from russet.images import png
from russet.images.png import Parameters

RED = Image.new("RGB", (4, 3), (255, 0, 0))

WEBUI = """(a cat:1.2), sitting
on the moon
Negative prompt: blurry, low quality
second line
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 6ce01616, Model: v1-5, \
Lora hashes: "a: 1f, b: 2e", Version: v1.6.0"""


def test_a_text_of_the_web_ui_is_read():
    read = Parameters.of_text(WEBUI)
    assert read.prompt == "(a cat:1.2), sitting\non the moon"
    assert read.negative_prompt == "blurry, low quality\nsecond line"
    assert list(read.settings) == [
        *("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model hash", "Model", "Lora hashes", "Version"),
    ]
    assert read.settings["Sampler"] == "DPM++ 2M Karras"
    assert read.settings["Lora hashes"] == "a: 1f, b: 2e"
    assert read.to_text() == WEBUI


@pytest.mark.parametrize("text", ["", "a cat", "a cat: big, grey", "two\nlines", "\n\n"])
def test_a_text_without_settings_is_all_prompt(text):
    read = Parameters.of_text(text)
    assert (read.prompt, read.negative_prompt, read.settings) == (text.strip(), "", {})


line = st.text(st.characters(blacklist_categories=("Cc", "Cs", "Zl", "Zp")), max_size=30).map(str.strip)
pairs = st.dictionaries(st.sampled_from(["Steps", "CFG scale", "Seed", "Model", "Face-fix", "Size"]), line, min_size=3)


@given(line, line, pairs)
def test_what_is_written_is_read(prompt, negative, settings):
    written = Parameters(prompt, negative, settings)
    if not prompt.startswith("Negative prompt: "):
        assert Parameters.of_text(written.to_text()) == written


@given(st.text())
def test_any_text_is_read_without_an_error(text):
    Parameters.of_text(text)


# -- files


def test_numbers_go_up_and_no_file_is_overwritten(tmp_path):
    (tmp_path / "russet-0007-seed1.png").write_bytes(b"precious")
    paths = [png.save_new(RED, tmp_path / "", "russet", tail=f"-seed{seed}") for seed in (42, 1)]
    assert [path.name for path in paths] == ["russet-0008-seed42.png", "russet-0009-seed1.png"]
    assert (tmp_path / "russet-0007-seed1.png").read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["russet-0007-seed1.png", *(path.name for path in paths)]


def test_a_taken_name_gets_a_number(tmp_path):
    names = [png.save_as(RED, tmp_path / "new" / "cat.png").name for _ in range(3)]
    assert names == ["cat.png", "cat-0002.png", "cat-0003.png"]


def test_many_threads_write_one_picture_many_times_each_whole(tmp_path):
    text = {"parameters": "a cat"}
    threads = [threading.Thread(target=png.save_as, args=(RED, tmp_path / "a.png", text)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(os.listdir(tmp_path)) == 12
    assert all(Image.open(path).text == text for path in tmp_path.iterdir())


def test_without_hard_links_it_still_never_overwrites(tmp_path, monkeypatch):
    def no_links(*_: object) -> None:
        raise PermissionError("hard links are not supported")

    monkeypatch.setattr(os, "link", no_links)
    names = [png.save_as(RED, tmp_path / "cat.png").name for _ in range(2)]
    assert names == ["cat.png", "cat-0002.png"]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert Image.open(tmp_path / "cat-0002.png").size == (4, 3)


@pytest.mark.parametrize("failing", ["write_bytes", "link"])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, failing):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((Path, "write_bytes") if failing == "write_bytes" else (os, "link")), interrupted)
    with pytest.raises(KeyboardInterrupt):
        png.save_as(RED, tmp_path / "cat.png")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_our_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        png.save_as(RED, tmp_path / "cat.png")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file_is_our_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        png.save_new(RED, tmp_path / "file", "russet")
    with pytest.raises(InputError, match=r"\.png"):
        png.save_as(RED, tmp_path / "cat.gif")


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    path = png.save_as(RED, tmp_path / "cat.png")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=60))
def test_text_survives_in_the_file(tmp_path_factory, text):
    path = png.save_new(RED, tmp_path_factory.mktemp("text"), "russet", {"parameters": text})
    with Image.open(path) as image:
        assert image.text == {"parameters": text}
