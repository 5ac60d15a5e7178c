"""Distilled models against Diffusers, with random weights: the arithmetic of 1 to 8 steps by LCM and TCD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import russet
from russet.errors import InputError, UnsupportedArgument

SAME = 60.0  # dB
STEPS = (1, 2, 4, 8)
PROMPTS = ["a red horse", "two cats on the moon"]
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def distilled(shared_reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as latent consistency models are published: a UNet that is told the scale, and its own scheduler."""
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel.from_config({**shared_reference.unet.config, "time_cond_proj_dim": 24})
    parts = {**shared_reference.components, "unet": unet, "scheduler": diffusers.LCMScheduler(**TABLE)}
    folder = tmp_path_factory.mktemp("distilled") / "lcm"
    pipe = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def streams() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(2)]


@pytest.fixture
def lcm(distilled: Path) -> Any:
    return quiet(russet.DiffusionPipeline.from_pretrained(distilled))


@pytest.fixture
def their_lcm(distilled: Path) -> Any:
    return quiet(diffusers.LatentConsistencyModelPipeline.from_pretrained(distilled))


@pytest.mark.parametrize("steps", STEPS)
def test_a_latent_consistency_model_draws_what_diffusers_draws(steps: int, lcm: Any, their_lcm: Any, psnr: Any) -> None:
    assert type(lcm) is russet.LatentConsistencyModelPipeline
    given = {"prompt": PROMPTS, "num_inference_steps": steps, "output_type": "np"}
    ours, theirs = lcm(generator=streams(), **given).images, their_lcm(generator=streams(), **given).images
    assert psnr(ours, theirs) > SAME


def test_its_defaults_are_four_steps_and_a_scale_that_the_unet_is_told(lcm: Any, their_lcm: Any, psnr: Any) -> None:
    rows: list[int] = []
    lcm.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))
    ours = lcm(PROMPTS, generator=streams(), output_type="np").images
    assert rows == [2] * 4, "asked once for each picture"
    theirs = their_lcm(PROMPTS, generator=streams(), output_type="np").images
    assert psnr(ours, theirs) > SAME
    other = lcm(PROMPTS, generator=streams(), output_type="np", guidance_scale=2.0).images
    assert psnr(ours, other) < SAME


def test_the_steps_of_its_distillation_are_the_schedulers(lcm: Any, their_lcm: Any, psnr: Any) -> None:
    lcm.scheduler = russet.LCMScheduler.from_config(lcm.scheduler.config, original_inference_steps=20)
    given = {"num_inference_steps": 3, "output_type": "np"}
    ours = lcm(PROMPTS, generator=streams(), **given).images
    theirs = their_lcm(PROMPTS, generator=streams(), original_inference_steps=20, **given).images
    assert psnr(ours, theirs) > SAME
    with pytest.raises(UnsupportedArgument, match="original_inference_steps"):
        lcm(PROMPTS, original_inference_steps=20)
    with pytest.raises(InputError, match="distilled for 20 steps"):
        lcm(PROMPTS, num_inference_steps=21)


@pytest.mark.parametrize(("given", "name"), [({"negative_prompt": "rain"}, "negative_prompt"), ({"sharp": 1}, "sharp")])
def test_what_means_nothing_to_such_a_model_is_refused(given: dict[str, Any], name: str, lcm: Any) -> None:
    with pytest.raises(UnsupportedArgument, match=name):
        lcm("a horse", **given)
    with pytest.raises(InputError, match="guidance_interval"):
        lcm("a horse", guidance_interval=(0, 0.5))


def test_it_is_saved_and_loaded_and_planned_for_one_row_a_picture(lcm: Any, tmp_path: Path) -> None:
    lcm.save_pretrained(tmp_path / "again")
    again = quiet(russet.DiffusionPipeline.from_pretrained(tmp_path / "again"))
    first, second = (pipe("a horse", seed=3, output_type="np") for pipe in (lcm, again))
    assert np.array_equal(first.images, second.images)
    assert first.plan.workload.rows == 1


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("scheduler", "eta"), [("LCMScheduler", 0.0), ("TCDScheduler", 0.0), ("TCDScheduler", 0.3), ("TCDScheduler", 1.0)]
)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_usual_pipeline_with_their_scheduler_draws_what_diffusers_draws(
    steps: int, scheduler: str, eta: float, scale: float, tiny: Any, reference: Any, psnr: Any
) -> None:
    # which is how a model is drawn with into which a LoRA for few steps was merged
    reference.scheduler = getattr(diffusers, scheduler).from_config(reference.scheduler.config)
    tiny.scheduler = getattr(russet, scheduler).from_config(tiny.scheduler.config)
    given = {"prompt": PROMPTS, "num_inference_steps": steps, "eta": eta, "guidance_scale": scale, "output_type": "np"}
    ours, theirs = tiny(generator=streams(), **given).images, reference(generator=streams(), **given).images
    assert psnr(ours, theirs) > SAME
