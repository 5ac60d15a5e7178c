"""The embedded model end to end: what it draws is what was asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from harness import backgrounds

SETTINGS = {"num_inference_steps": 5, "guidance_scale": 5.0}
SMALL = {"height": 128, "width": 128, "num_inference_steps": 2, "output_type": "np"}  # where any picture will do
SAME = 60.0  # dB


def test_the_background_has_the_colour_that_the_prompt_asks_for(shared_mini: Any) -> None:
    pictures = shared_mini(backgrounds.PROMPTS, seed=0, height=128, width=128, output_type="pt", **SETTINGS).images
    assert backgrounds.right(pictures) >= 6


def test_english_and_korean_ask_for_the_same_scene(shared_mini: Any) -> None:
    prompts = ["a photo of an astronaut riding a horse on mars", "화성에서 말을 타는 우주비행사", "a cat in the sea"]
    mars, korean, sea = (
        np.asarray(picture, dtype=float)[-64:].mean(axis=(0, 1))
        for picture in shared_mini(prompts, seed=42, **SETTINGS).images
    )
    for ground in (mars, korean):
        assert ground[0] > ground[2] + 60, "the ground of Mars is more red than blue"
    assert sea[2] > sea[0], "the sea is more blue than red"


def test_the_same_seed_gives_the_same_picture(shared_mini: Any) -> None:
    first, again, other = (shared_mini("a red apple", seed=seed, **SMALL).images for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_sliced_and_fused_attention_agree(mini: Any, psnr: Any) -> None:
    fused = mini("a red apple", seed=7, **SMALL).images
    mini.enable_attention_slicing("max")
    assert psnr(fused, mini("a red apple", seed=7, **SMALL).images) > SAME


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_batch_of_four_equals_four_single_runs(micro_batch: int | None, mini: Any, psnr: Any) -> None:
    prompts = ["a red apple", "a horse", "two cats", "고양이"]
    if micro_batch is not None:
        mini._choose(micro_batch=micro_batch)
    together = mini(prompts, seed=[5, 6, 7, 8], **SMALL).images
    for i, prompt in enumerate(prompts):
        assert psnr(together[i], mini(prompt, seed=5 + i, **SMALL).images[0]) > SAME


def test_the_guides_program_runs_with_the_embedded_model() -> None:
    from russet import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("mini")
    pipe = pipe.to("cpu")
    pipe.enable_attention_slicing()
    pipe.set_progress_bar_config(disable=True)
    prompt = "a photo of an astronaut riding a horse on mars"
    _ = pipe(prompt, num_inference_steps=1)
    image = pipe(prompt, num_inference_steps=2).images[0]
    assert image.size == (256, 256)


def test_a_picture_in_bfloat16_is_nearly_that_in_float32(shared_mini: Any) -> None:
    from russet import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("mini", dtype="bfloat16")
    pipe.set_progress_bar_config(disable=True)
    wanted = {"prompt": ["a photo of an astronaut riding a horse on mars", "a cat on the moon"], "seed": [11, 2]}
    rounded, exact = (one(**wanted, **SETTINGS, output_type="np").images for one in (pipe, shared_mini))
    assert str(pipe.unet.dtype) == "torch.bfloat16"
    for a, b in zip(rounded, exact, strict=True):
        assert -10 * np.log10(np.square(a - b).mean()) > 35  # dB; the bound for what is asked for to save time
