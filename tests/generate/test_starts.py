"""What a run starts from: its schedule, its size, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import russet
from russet.errors import InputError, UnsupportedArgument
from russet.generate.starts import ImageStart

FAST = {"num_inference_steps": 5, "output_type": "np", "seed": 1}


@pytest.fixture
def pipe(tiny: Any) -> Any:
    made = russet.StableDiffusionImg2ImgPipeline(**tiny.components, requires_safety_checker=False)
    made.scheduler = russet.DDIMScheduler.from_config(tiny.scheduler.config)
    made.set_progress_bar_config(disable=True)
    return made


def picture(width: int = 64, height: int = 64) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_strength_is_the_part_of_the_steps_that_is_made(pipe: Any) -> None:
    schedule = pipe.scheduler.schedule(10)
    for strength, steps in ((1.0, 10), (0.99, 9), (0.55, 5), (0.1, 1)):
        rest = ImageStart(image=picture(), strength=strength).rest_of(schedule)
        assert rest.timesteps == schedule.timesteps[10 - steps :]


def test_the_weaker_the_nearer_to_the_picture(shared_mini: Any, psnr: Any) -> None:
    pipe = russet.StableDiffusionImg2ImgPipeline(**shared_mini.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    before = shared_mini("a red apple", 128, 128, num_inference_steps=5, seed=1).images[0]
    given = {"num_inference_steps": 8, "output_type": "np", "seed": 2}
    distances = [
        psnr(pipe("a blue cat", before, strength, **given).images[0], np.asarray(before) / 255)
        for strength in (0.13, 0.5, 1.0)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > distances[-1] + 6


def test_a_picture_does_not_depend_on_the_batch_it_is_made_in(pipe: Any, psnr: Any) -> None:
    together = pipe(["a horse", "a cat"], picture(), **{**FAST, "seed": [3, 9]}).images
    for image, prompt, seed in zip(together, ["a horse", "a cat"], [3, 9], strict=True):
        assert psnr(image, pipe(prompt, picture(), **{**FAST, "seed": seed}).images[0]) > 60


def test_the_size_and_the_plan_are_those_of_the_picture(pipe: Any) -> None:
    output = pipe("a horse", picture(83, 50), **FAST)
    assert output.images.shape == (1, 48, 80, 3)
    assert output.plan.workload.encodes
    assert list(output.times) == ["text", "encode", "denoise", "decode"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": None}, "image is missing"),
        ({"image": []}, "image is an empty list"),
        ({"strength": 1.2}, "strength must be at most 1"),
        ({"strength": -0.1}, "strength must be at least 0"),
        ({"strength": 0.1}, "strength 0.1 leaves none of 5 steps"),
        ({"strength": 0.0}, "leaves none"),
        ({"image": [picture()] * 3, "prompt": ["a", "b"]}, "3 pictures for a batch of 2"),
        ({"image": torch.full((3, 64, 64), float("nan"))}, "not finite"),
    ],
    ids=range(8),
)
def test_a_start_that_makes_no_sense_is_refused(given: dict[str, Any], message: str, pipe: Any) -> None:
    with pytest.raises(InputError, match=message):
        pipe(**{"prompt": "a horse", "image": picture(), **FAST, **given})


def test_arguments_that_the_family_lacks_are_named(pipe: Any) -> None:
    with pytest.raises(UnsupportedArgument, match="ip_adapter_image"):
        pipe("a horse", picture(), ip_adapter_image=picture())
    with pytest.raises(UnsupportedArgument, match="width"):
        pipe("a horse", picture(), width=64)
