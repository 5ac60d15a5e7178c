"""Whole pictures against Diffusers: weights saved by Diffusers and loaded by Russet give the same pictures."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import russet

SAME = 60.0  # dB; float32 rounding in another order leaves about 100

PROMPTS = ["a red horse", "two cats on the moon"]
SETTINGS = {"num_inference_steps": 5, "output_type": "np"}

SCHEDULERS = {
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "PNDM with PRK": ("PNDMScheduler", {"skip_prk_steps": False}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "LCM": ("LCMScheduler", {}),
}


@pytest.fixture
def both(reference: Any, tiny: Any) -> Any:
    """Calls both pipelines alike and returns both answers; a callable generator makes each its own."""

    def call(**given: Any) -> tuple[Any, Any]:
        def fresh() -> dict[str, Any]:
            return {name: value() if name == "generator" else value for name, value in given.items()}

        return reference(**{**SETTINGS, **fresh()}).images, tiny(**{**SETTINGS, **fresh()}).images

    return call


def one_stream() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def stream_per_image(count: int) -> Any:
    return lambda: [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_the_picture_that_diffusers_draws(
    name: str, both: Any, reference: Any, tiny: Any, psnr: Any
) -> None:
    kind, changes = SCHEDULERS[name]
    config = {**reference.scheduler.config, **changes}
    reference.scheduler = getattr(diffusers, kind).from_config(config)
    tiny.scheduler = getattr(russet, kind).from_config(config)
    theirs, ours = both(prompt=PROMPTS[0], generator=one_stream)
    assert psnr(theirs, ours) > SAME


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_every_prediction_type_agrees(prediction: str, both: Any, reference: Any, tiny: Any, psnr: Any) -> None:
    config = {**reference.scheduler.config, "prediction_type": prediction, "clip_sample": False}
    reference.scheduler = diffusers.DDIMScheduler.from_config(config)
    tiny.scheduler = russet.DDIMScheduler.from_config(config)
    theirs, ours = both(prompt=PROMPTS[0], generator=one_stream)
    assert psnr(theirs, ours) > SAME


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": PROMPTS},
        {"prompt": PROMPTS, "negative_prompt": ["a blue car", "rain"]},
        {"prompt": PROMPTS, "generator": stream_per_image(2)},
        {"prompt": PROMPTS, "num_images_per_prompt": 2, "generator": stream_per_image(4)},
        {"prompt": "a red horse", "guidance_scale": 1.0},
        {"prompt": "a red horse", "guidance_scale": 12.0, "guidance_rescale": 0.7},
        {"prompt": "a red horse", "height": 96, "width": 48},
        {"prompt": "a very long story " * 40},
        {"prompt": ""},
    ],
    ids=lambda given: ", ".join(given)[:60],
)
def test_every_argument_means_what_it_means_in_diffusers(given: dict[str, Any], both: Any, psnr: Any) -> None:
    theirs, ours = both(**{"generator": one_stream, **given})
    assert theirs.shape == ours.shape
    assert psnr(theirs, ours) > SAME


def test_latents_in_and_out_agree(both: Any, psnr: Any) -> None:
    start = torch.randn(1, 4, 8, 8, generator=one_stream())
    theirs, ours = both(prompt="a red horse", latents=start, output_type="latent")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_prompt_embeds_stand_in_for_prompts(both: Any, psnr: Any) -> None:
    embeds = torch.randn(2, 77, 32, generator=one_stream())
    theirs, ours = both(prompt_embeds=embeds, negative_prompt_embeds=embeds.flip(1), generator=one_stream)
    assert psnr(theirs, ours) > SAME


def test_clip_skip_takes_an_earlier_layer_for_the_prompt_alone(reference: Any, tiny: Any, psnr: Any) -> None:
    # Diffusers computes this itself, but not with every transformers: its recipe is written out here.
    def encode(text: str, layer: int) -> torch.Tensor:
        ids = reference.tokenizer([text], padding="max_length", max_length=77, return_tensors="pt").input_ids
        model = reference.text_encoder
        norm = getattr(model, "text_model", model).final_layer_norm
        return norm(model(ids, output_hidden_states=True).hidden_states[layer])

    theirs = reference(
        prompt_embeds=encode("a red horse", -2),
        negative_prompt_embeds=encode("rain", -1),
        generator=one_stream(),
        **SETTINGS,
    ).images
    ours = tiny("a red horse", negative_prompt="rain", clip_skip=1, generator=one_stream(), **SETTINGS).images
    assert psnr(theirs, ours) > SAME
    assert psnr(theirs, tiny("a red horse", negative_prompt="rain", generator=one_stream(), **SETTINGS).images) < SAME


def test_eta_makes_ddim_stochastic_in_the_same_way(both: Any, reference: Any, tiny: Any, psnr: Any) -> None:
    config = {**reference.scheduler.config, "clip_sample": False}
    reference.scheduler = diffusers.DDIMScheduler.from_config(config)
    tiny.scheduler = russet.DDIMScheduler.from_config(config)
    theirs, ours = both(prompt=PROMPTS, eta=0.6, generator=stream_per_image(2))
    assert psnr(theirs, ours) > SAME


@pytest.mark.parametrize("given", [{"timesteps": [900, 500, 100]}, {"sigmas": [12.0, 4.0, 0.5]}], ids=str)
def test_own_timesteps_and_sigmas_agree(given: dict[str, Any], both: Any, reference: Any, tiny: Any, psnr: Any) -> None:
    config = {**reference.scheduler.config, "timestep_spacing": "linspace"}
    reference.scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    tiny.scheduler = russet.EulerDiscreteScheduler.from_config(config)
    theirs, ours = both(prompt="a red horse", generator=one_stream, **given)
    assert psnr(theirs, ours) > SAME


def test_a_callback_sees_and_changes_the_same_latents(both: Any, psnr: Any) -> None:
    seen: list[tuple[int, float, torch.Tensor]] = []

    def darken(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((index, float(t), tensors["latents"].clone()))
        return {"latents": tensors["latents"] * 0.9}

    theirs, ours = both(prompt="a red horse", generator=one_stream, callback_on_step_end=darken)
    assert psnr(theirs, ours) > SAME
    half = len(seen) // 2
    for (i, t, a), (j, u, b) in zip(seen[:half], seen[half:], strict=True):
        assert (i, t) == (j, u)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_guidance_switched_off_by_a_callback_agrees(both: Any, psnr: Any) -> None:
    def without_guidance_from_step_two(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    theirs, ours = both(
        prompt="a red horse",
        generator=one_stream,
        callback_on_step_end=without_guidance_from_step_two,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert psnr(theirs, ours) > SAME


def test_the_safety_checker_blackens_the_same_pictures(tiny_folder: Any, psnr: Any) -> None:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder)
    ours = russet.StableDiffusionPipeline.from_pretrained(tiny_folder)
    weights = torch.full_like(theirs.safety_checker.concept_embeds_weights, -2.0)  # less than a cosine: all flagged
    for pipe in (theirs, ours):
        pipe.safety_checker.concept_embeds_weights.data = weights
        pipe.set_progress_bar_config(disable=True)
    a = theirs(PROMPTS, num_inference_steps=1, output_type="np")
    b = ours(PROMPTS, num_inference_steps=1, output_type="np")
    assert a.nsfw_content_detected == b.nsfw_content_detected == [True, True]
    assert not np.any(a.images)
    assert not np.any(b.images)


def test_a_saved_pipeline_draws_the_same_picture_in_diffusers(tiny: Any, tmp_path: Any, psnr: Any) -> None:
    tiny.save_pretrained(tmp_path / "saved")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    a = theirs("a red horse", generator=one_stream(), **SETTINGS).images
    b = tiny("a red horse", generator=one_stream(), **SETTINGS).images
    assert psnr(a, b) > SAME
