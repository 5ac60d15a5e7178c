"""Pictures as tensors and as files."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from russet.errors import ArgumentTypeError, InputError, OutputError
from russet.images import conversion

RED = Image.new("RGB", (4, 3), (255, 0, 0))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def test_every_8_bit_value_survives_the_way_in_and_out():
    picture = Image.fromarray(np.arange(256 * 3, dtype=np.uint32).reshape(16, 16, 3).astype(np.uint8))
    (again,) = conversion.to_pil(conversion.from_pil(picture))
    assert np.array_equal(np.asarray(again), np.asarray(picture))


def test_output_types_equal_diffusers():
    from diffusers.image_processor import VaeImageProcessor

    x, reference = noise(2, 3, 8, 16), VaeImageProcessor()
    for ours, theirs in zip(conversion.as_output(x, "pil"), reference.postprocess(x, output_type="pil"), strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert np.array_equal(conversion.as_output(x, "np"), reference.postprocess(x, output_type="np"))
    assert torch.equal(conversion.as_output(x, "pt"), reference.postprocess(x, output_type="pt"))


def test_pixels_are_in_range_and_float32_whatever_comes():
    x = noise(1, 3, 4, 4).mul(50).to(torch.bfloat16)
    array = conversion.to_numpy(x)
    assert array.dtype == np.float32
    assert array.shape == (1, 4, 4, 3)
    assert array.min() == 0
    assert array.max() == 1


def test_from_pil_is_minus_one_to_one_and_drops_alpha():
    x = conversion.from_pil([Image.new("RGBA", (5, 2), (255, 0, 127, 10)), Image.new("RGBA", (5, 2), (0, 255, 0, 255))])
    assert x.shape == (2, 3, 2, 5)
    assert x[0, :, 0, 0].tolist() == pytest.approx([1, -1, 127 / 127.5 - 1])


def test_from_pil_refuses_what_is_no_batch_of_pictures():
    with pytest.raises(InputError, match="one size"):
        conversion.from_pil([RED, Image.new("RGB", (3, 4))])
    with pytest.raises(InputError, match="none at all"):
        conversion.from_pil([])
    with pytest.raises(ArgumentTypeError):
        conversion.from_pil([np.zeros((4, 4, 3))])
    with pytest.raises(InputError, match="output_type"):
        conversion.as_output(noise(1, 3, 2, 2), "jpg")


# -- files


def test_numbers_go_up_and_no_file_is_overwritten(tmp_path):
    (tmp_path / "russet-0007-seed1.png").write_bytes(b"precious")
    paths = [conversion.save_new(RED, tmp_path / "", "russet", tail=f"-seed{seed}") for seed in (42, 1)]
    assert [path.name for path in paths] == ["russet-0008-seed42.png", "russet-0009-seed1.png"]
    assert (tmp_path / "russet-0007-seed1.png").read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["russet-0007-seed1.png", *(path.name for path in paths)]


def test_a_taken_name_gets_a_number(tmp_path):
    names = [conversion.save_as(RED, tmp_path / "new" / "cat.png").name for _ in range(3)]
    assert names == ["cat.png", "cat-0002.png", "cat-0003.png"]


def test_many_threads_write_one_picture_many_times_each_whole(tmp_path):
    text = {"parameters": "a cat"}
    threads = [threading.Thread(target=conversion.save_as, args=(RED, tmp_path / "a.png", text)) for _ in range(12)]
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
    names = [conversion.save_as(RED, tmp_path / "cat.png").name for _ in range(2)]
    assert names == ["cat.png", "cat-0002.png"]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert Image.open(tmp_path / "cat-0002.png").size == (4, 3)


@pytest.mark.parametrize("failing", ["write_bytes", "link"])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, failing):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((Path, "write_bytes") if failing == "write_bytes" else (os, "link")), interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversion.save_as(RED, tmp_path / "cat.png")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_our_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        conversion.save_as(RED, tmp_path / "cat.png")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file_is_our_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        conversion.save_new(RED, tmp_path / "file", "russet")
    with pytest.raises(InputError, match=r"\.png"):
        conversion.save_as(RED, tmp_path / "cat.gif")


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    path = conversion.save_as(RED, tmp_path / "cat.png")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=60))
def test_text_survives_in_the_file(tmp_path_factory, text):
    path = conversion.save_new(RED, tmp_path_factory.mktemp("text"), "russet", {"parameters": text})
    with Image.open(path) as image:
        assert image.text == {"parameters": text}
