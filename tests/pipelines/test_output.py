"""What a call returns, as a debugger and a notebook show it."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
from PIL import Image

import russet
from russet.pipelines.output import StableDiffusionPipelineOutput


def test_a_notebook_shows_every_image():
    images = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    output = StableDiffusionPipelineOutput(images, seeds=(3, 4))
    shown = re.findall(r'src="data:image/png;base64,([^"]+)"', output._repr_html_())
    decoded = [Image.open(io.BytesIO(base64.b64decode(data))) for data in shown]
    assert [image.getpixel((0, 0)) for image in decoded] == [(255, 0, 0), (0, 0, 255)]
    assert Image.open(io.BytesIO(output._repr_png_())).size == (8, 6)
    assert repr(output) == "<StableDiffusionPipelineOutput: 2 images, seeds 3, 4>"


def test_arrays_are_shown_by_their_shape():
    output = StableDiffusionPipelineOutput(np.zeros((1, 8, 8, 3)))
    assert output._repr_html_() is None
    assert output._repr_png_() is None
    assert repr(output) == "<StableDiffusionPipelineOutput: ndarray [1, 8, 8, 3]>"


def test_a_scheduler_is_one_short_line():
    scheduler = russet.EulerDiscreteScheduler()
    scheduler.set_timesteps(7)
    assert repr(scheduler) == "<EulerDiscreteScheduler: predicts epsilon, 7 steps>"
