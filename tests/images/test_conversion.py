"""Pillow images to and from tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from russet.errors import ArgumentTypeError, InputError
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
    array = conversion.as_output(x, "np")
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
