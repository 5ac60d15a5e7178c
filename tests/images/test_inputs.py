"""Pictures as callers give them: Pillow images of every mode, arrays, tensors and lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from russet.errors import ArgumentTypeError, InputError
from russet.images.inputs import read_pictures


def read(value: Any) -> torch.Tensor:
    return read_pictures("image", value, multiple=8, latent_channels=4)


def picture(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "F"])
def test_every_mode_is_read_as_pillow_converts_it(mode: str) -> None:
    image = picture(mode)
    wanted = np.asarray(image.convert("RGB"), dtype=np.float32) / 127.5 - 1
    np.testing.assert_allclose(read(image)[0].permute(1, 2, 0).numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bits_are_read_over_their_whole_range(dtype: Any) -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(dtype)
    x = read(Image.fromarray(values))
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert torch.allclose(x[0, 0], torch.from_numpy(values / 32767.5 - 1).float(), atol=0.01)


def test_the_orientation_in_exif_is_applied() -> None:
    image = picture()
    image.getexif()[0x0112] = 6  # turned by a quarter, as telephones write it
    assert read(image).shape == (1, 3, 24, 16)
    assert torch.equal(read(image), read(picture().rotate(-90, expand=True)))


def test_sides_become_multiples_and_all_pictures_the_size_of_the_first() -> None:
    images = [Image.new("RGB", (29, 18), "red"), Image.new("RGB", (64, 64), "blue")]
    x = read(images)
    assert x.shape == (2, 3, 16, 24)
    assert x[:, :, 0, 0].tolist() == [[1, -1, -1], [-1, -1, 1]]


def test_arrays_and_tensors_are_read_like_the_image_that_they_are() -> None:
    wanted = read(picture())
    bytes_ = np.asarray(picture())
    floats = bytes_.astype(np.float32) / 255
    chw = torch.from_numpy(floats).permute(2, 0, 1)
    for value in (
        bytes_,
        floats,
        floats[None],
        [floats],
        chw,
        chw[None],
        [chw],
        chw * 2 - 1,
        torch.from_numpy(bytes_).permute(2, 0, 1),
    ):
        assert torch.allclose(read(value), wanted, atol=1e-6)
    assert read([floats, floats]).shape == (2, 3, 16, 24)
    assert read(floats[..., 0]).shape == (1, 3, 16, 24)


def test_latents_are_returned_as_they_are() -> None:
    latents = torch.randn(2, 4, 3, 5)
    assert torch.equal(read(latents), latents)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([], InputError, "empty list"),
        ("a.png", ArgumentTypeError, "image must be"),
        ([picture(), np.zeros((8, 8, 3))], ArgumentTypeError, "one kind"),
        (Image.new("RGB", (7, 64)), InputError, "at least 8×8"),
        (torch.full((3, 8, 8), float("nan")), InputError, "not finite"),
        (torch.zeros(5, 8, 8), InputError, "channels"),
        (torch.zeros(8, 8), InputError, "C, H, W"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 16, 8)], InputError, "one size"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), ArgumentTypeError, "floating-point"),
        (np.zeros((8, 8, 3), dtype=np.int32), ArgumentTypeError, "floating-point"),
    ],
    ids=range(10),
)
def test_what_is_no_picture_is_refused_by_name(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(value)
