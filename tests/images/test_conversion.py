"""Tensors as images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from russet.errors import InputError
from russet.images import conversion
from russet.images.inputs import read_pictures


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def test_every_8_bit_value_survives_the_way_in_and_out():
    picture = Image.fromarray(np.arange(256 * 3, dtype=np.uint32).reshape(16, 16, 3).astype(np.uint8))
    (again,) = conversion.to_pil(read_pictures("image", picture, multiple=1))
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


def test_another_output_type_is_refused():
    with pytest.raises(InputError, match="output_type"):
        conversion.as_output(noise(1, 3, 2, 2), "jpg")
