"""The image processor against transformers' CLIPImageProcessor."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from russet.errors import ArgumentTypeError, ConfigError, InputError, MissingFile
from russet.images.clip_processor import CLIPImageProcessor

STYLES = {
    "new": {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
    "old": {"size": 224, "crop_size": 224},
    "small": {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 28}, "resample": 2},
    "exact": {"size": {"height": 40, "width": 33}, "do_center_crop": False},
    "crop only": {"do_resize": False, "crop_size": {"height": 101, "width": 64}, "image_mean": [0.1, 0.2, 0.3]},
    "plain": {"do_normalize": False, "do_rescale": False, "size": 64, "crop_size": 64},
}


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [(224, 224), (256, 256), (512, 768), (333, 117), (50, 81)])
def test_pixels_equal_transformers(style, size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Reference

    image = picture(*size)
    ours = CLIPImageProcessor.from_config(STYLES[style])([image, image]).pixel_values
    theirs = Reference(**STYLES[style])([image, image], return_tensors="pt").pixel_values
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_other_modes_become_rgb_as_in_transformers(mode):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Reference

    image = picture(300, 200, mode)
    torch.testing.assert_close(
        CLIPImageProcessor()(image).pixel_values,
        Reference()(image, return_tensors="pt").pixel_values.float(),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("style", STYLES)
def test_what_is_saved_transformers_reads_the_same(style, tmp_path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Reference

    processor = CLIPImageProcessor.from_config({**STYLES[style], "do_convert_rgb": True})
    processor.save(tmp_path)
    image = picture(90, 120)
    theirs = Reference.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(processor(image).pixel_values, theirs.float(), rtol=0, atol=1e-5)
    assert CLIPImageProcessor.from_files(tmp_path).config.resized(90, 120) == processor.config.resized(90, 120)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["do_convert_rgb"] is True


@pytest.mark.parametrize(
    "bad",
    [
        {"size": {"longest_edge": 224}},
        {"size": 0},
        {"size": {"shortest_edge": "224"}},
        {"size": True},
        {"crop_size": {"shortest_edge": 224}},
        {"crop_size": -3},
        {"resample": 9},
        {"image_std": [1, 0, 1]},
        {"image_mean": [0.5]},
        {"rescale_factor": float("nan")},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ConfigError):
        CLIPImageProcessor.from_config(bad)


def test_bad_input_is_refused(tmp_path):
    processor = CLIPImageProcessor()
    with pytest.raises(ArgumentTypeError, match="Pillow"):
        processor([np.zeros((4, 4, 3))])
    with pytest.raises(InputError, match="return_tensors"):
        processor(picture(9, 9), return_tensors="np")
    with pytest.raises(InputError, match="different sizes"):
        CLIPImageProcessor(do_center_crop=False)([picture(30, 40), picture(40, 30)])
    with pytest.raises(MissingFile):
        CLIPImageProcessor.from_files(tmp_path)
    assert processor([]).pixel_values.shape == (0, 3, 224, 224)
