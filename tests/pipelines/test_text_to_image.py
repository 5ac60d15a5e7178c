"""What a call does, apart from agreeing with Diffusers: seeds, batches, switches, interruption, recovery."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import russet
from russet.errors import ArgumentTypeError, DoesNotFit, InputError, UnsupportedArgument
from russet.models.attention import HAS_SDPA

FAST = {"num_inference_steps": 2, "output_type": "np"}
SAME = 60.0  # dB


def text_rows(args: Any) -> int:
    """How many rows of text a UNet is called with: a tensor, or what was computed of it beforehand."""
    return len(getattr(args[2], "tensor", args[2]))


def test_a_call_returns_one_pil_image_per_prompt(tiny: Any) -> None:
    output = tiny(["a horse", "a cat"], num_inference_steps=1)
    assert [type(image) for image in output.images] == [Image.Image] * 2
    assert output.images[0].size == (64, 64)
    assert output.nsfw_content_detected is None


def test_the_output_unpacks_and_indexes_like_a_tuple(tiny: Any) -> None:
    output = tiny("a horse", **FAST)
    images, flags = output
    assert images is output.images is output[0] is output["images"]
    assert flags is output.nsfw_content_detected is output[1]
    plain = tiny("a horse", **FAST, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == 2


def test_every_output_type_has_its_shape_and_range(tiny: Any) -> None:
    def call(kind: str) -> Any:
        return tiny(["a horse", "a cat"], num_inference_steps=1, output_type=kind, seed=1, width=72).images

    array, tensor, latents, pictures = call("np"), call("pt"), call("latent"), call("pil")
    assert array.shape == (2, 64, 72, 3)
    assert 0 <= array.min() < array.max() <= 1
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert latents.shape == (2, 4, 8, 9)
    np.testing.assert_array_equal(np.asarray(pictures[1]), (array[1] * 255).round().astype(np.uint8))


def test_the_output_says_which_precision_was_used_and_why(tiny: Any) -> None:
    decision = tiny("a horse", **FAST).plan.why("dtype.unet")
    assert decision.value == "float32"
    assert decision.reason


def test_the_output_gives_the_time_of_each_phase(tiny: Any) -> None:
    times = tiny("a horse", **FAST).times
    assert list(times) == ["text", "denoise", "decode"]
    assert all(seconds > 0 for seconds in times.values())


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(tiny: Any) -> None:
    first, again, other = (tiny("a horse", seed=seed, **FAST).images for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 0.05


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_picture_does_not_depend_on_the_batch_it_is_made_in(scheduler: str, tiny: Any, psnr: Any) -> None:
    tiny.scheduler = getattr(russet, scheduler).from_config(tiny.scheduler.config)
    together = tiny("a horse", num_images_per_prompt=4, seed=[3, 9, 4, 1], **FAST).images
    for picture, seed in zip(together, [3, 9, 4, 1], strict=True):
        assert psnr(picture, tiny("a horse", seed=seed, **FAST).images[0]) > SAME


def test_one_seed_for_several_pictures_counts_up(tiny: Any, psnr: Any) -> None:
    output = tiny("a horse", num_images_per_prompt=3, seed=10, **FAST)
    assert output.seeds == (10, 11, 12)
    assert psnr(output.images[2], tiny("a horse", seed=12, **FAST).images[0]) > SAME


def test_one_negative_prompt_is_for_all_prompts(tiny: Any) -> None:
    one = tiny(["a horse", "a cat"], negative_prompt="rain", seed=1, **FAST).images
    each = tiny(["a horse", "a cat"], negative_prompt=["rain", "rain"], seed=1, **FAST).images
    assert np.array_equal(one, each)
    assert not np.array_equal(one, tiny(["a horse", "a cat"], seed=1, **FAST).images)


def test_without_a_seed_the_global_generator_decides(tiny: Any) -> None:
    torch.manual_seed(3)
    first = tiny("a horse", **FAST).images
    torch.manual_seed(3)
    assert np.array_equal(first, tiny("a horse", **FAST).images)
    assert not np.array_equal(first, tiny("a horse", **FAST).images)


def test_micro_batches_give_the_pictures_of_one_large_batch(tiny: Any, psnr: Any) -> None:
    prompts = ["a horse", "a cat", "a dog"]
    whole = tiny(prompts, seed=1, **FAST).images
    tiny._choose(micro_batch=2)
    calls = []
    hook = tiny.unet.register_forward_pre_hook(lambda unet, args: calls.append(text_rows(args)))
    parts = tiny(prompts, seed=1, **FAST).images
    hook.remove()
    assert calls == [4, 2] * (len(calls) // 2)  # guided: two rows per picture
    assert psnr(whole, parts) > SAME


@pytest.mark.parametrize("size", ["auto", "max", 1, 2])
def test_sliced_attention_draws_the_same_picture(size: Any, tiny: Any, psnr: Any) -> None:
    plain = tiny("a horse", seed=1, **FAST).images
    tiny.enable_attention_slicing(size)
    sliced = tiny("a horse", seed=1, **FAST)
    assert sliced.plan.attention("unet").kind == "sliced"
    assert sliced.plan.why("attention.unet").by == "user"
    assert psnr(plain, sliced.images) > SAME
    tiny.disable_attention_slicing()
    off = tiny("a horse", seed=1, **FAST).plan.attention("unet")
    assert off.kind == "fused" if HAS_SDPA else off.rows == 2 * 4, "all of the score matrices at once"


@pytest.mark.parametrize("size", ["most", 0, -1, 1.5, True, 3.0])
def test_a_slice_size_that_is_none_is_refused(size: Any, tiny: Any) -> None:
    with pytest.raises(InputError, match="slice"):
        tiny.enable_attention_slicing(size)
    assert tiny("a horse", **FAST).images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("switch", ["vae_slicing", "vae_tiling"])
def test_vae_switches_draw_the_same_picture_and_are_listed_as_the_users(switch: str, tiny: Any, psnr: Any) -> None:
    plain = tiny(["a horse", "a cat"], seed=1, **FAST).images
    getattr(tiny, f"enable_{switch}")()
    output = tiny(["a horse", "a cat"], seed=1, **FAST)
    assert psnr(plain, output.images) > SAME
    assert [decision.name for decision in output.plan.decisions if decision.by == "user" and "vae_" in decision.name]
    getattr(tiny, f"disable_{switch}")()
    assert psnr(plain, tiny(["a horse", "a cat"], seed=1, **FAST).images) > SAME


def test_interrupting_from_a_callback_stops_after_that_step(tiny: Any) -> None:
    seen = []

    def stop(pipe: Any, index: int, t: Any, tensors: Any) -> dict[str, Any]:
        seen.append(index)
        pipe.interrupt = index == 1
        return {}

    output = tiny("a horse", num_inference_steps=9, callback_on_step_end=stop, output_type="np")
    assert seen == [0, 1]
    assert output.images.shape == (1, 64, 64, 3)
    assert tiny("a horse", num_inference_steps=3, callback_on_step_end=None, output_type="np").images.any()


def test_diffusers_way_to_interrupt_works_too(tiny: Any) -> None:
    seen = []

    def stop(pipe: Any, index: int, t: Any, tensors: Any) -> dict[str, Any]:
        seen.append(index)
        pipe._interrupt = True
        return tensors

    tiny("a horse", num_inference_steps=9, callback_on_step_end=stop, output_type="np")
    assert seen == [0]


def test_the_pipeline_tells_a_callback_about_its_call(tiny: Any) -> None:
    told = []

    def look(pipe: Any, index: int, t: Any, tensors: Any) -> dict[str, Any]:
        told.append((pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance, int(t)))
        return tensors

    tiny.scheduler = russet.DDIMScheduler.from_config(tiny.scheduler.config)
    tiny("a horse", num_inference_steps=3, guidance_scale=4.0, callback_on_step_end=look)
    assert [row[:3] for row in told] == [(3, 4.0, True)] * 3
    assert [row[3] for row in told] == [int(t) for t in tiny.scheduler.schedule(3).timesteps]


@pytest.mark.parametrize("answer", [3, {"latents": 3}, {"latents": torch.zeros(1)}, {"noise": torch.zeros(1)}], ids=str)
def test_what_a_callback_must_not_return_is_named(answer: Any, tiny: Any) -> None:
    with pytest.raises(InputError, match="callback_on_step_end"):
        tiny("a horse", **FAST, callback_on_step_end=lambda *args: answer)
    assert tiny("a horse", **FAST).images.shape == (1, 64, 64, 3)


def test_an_error_in_a_callback_leaves_the_pipeline_working(tiny: Any) -> None:
    before = tiny("a horse", seed=1, **FAST).images

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny("a horse", **FAST, callback_on_step_end=fail)
    assert np.array_equal(before, tiny("a horse", seed=1, **FAST).images)


def test_a_prompt_that_is_too_long_is_cut_with_a_warning_that_shows_what_is_lost(tiny: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "russet"):
        tiny("cat " * 80 + "zebra", **FAST)
    assert "zebra" in caplog.text
    assert "77" in caplog.text


def test_guidance_is_left_out_at_a_scale_of_one(tiny: Any) -> None:
    rows = []
    hook = tiny.unet.register_forward_pre_hook(lambda unet, args: rows.append(text_rows(args)))
    tiny("a horse", **FAST, guidance_scale=1.0)
    tiny("a horse", **FAST, guidance_scale=1.5)
    hook.remove()
    assert set(rows[: len(rows) // 2]) == {1}
    assert set(rows[len(rows) // 2 :]) == {2}


def test_a_pipeline_without_text_encoder_draws_from_embeddings(tiny: Any) -> None:
    bare = type(tiny)(**{**tiny.components, "text_encoder": None, "tokenizer": None}, requires_safety_checker=False)
    bare.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 77, 32)
    assert bare(prompt_embeds=embeds, negative_prompt_embeds=embeds, **FAST).images.shape == (1, 64, 64, 3)
    with pytest.raises(InputError, match="text encoder"):
        bare("a horse", **FAST)


def test_components_make_another_pipeline_that_shares_them(tiny: Any) -> None:
    other = russet.StableDiffusionPipeline(**tiny.components, requires_safety_checker=False)
    assert other.unet is tiny.unet
    assert list(tiny.components) == [
        "vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor"
    ]  # fmt: skip


def test_a_component_of_another_library_is_refused_by_name(tiny: Any, reference: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"unet must be a russet UNet2DConditionModel, not diffusers"):
        russet.StableDiffusionPipeline(**{**tiny.components, "unet": reference.unet})
    with pytest.raises(ArgumentTypeError, match="unet must be a russet UNet2DConditionModel, not nothing"):
        russet.StableDiffusionPipeline(**{**tiny.components, "unet": None})


def test_a_scheduler_can_be_swapped_for_one_made_from_its_config(tiny: Any) -> None:
    before = tiny("a horse", seed=1, **FAST).images
    tiny.scheduler = russet.EulerDiscreteScheduler.from_config(tiny.scheduler.config)
    assert not np.array_equal(before, tiny("a horse", seed=1, **FAST).images)


@pytest.mark.parametrize("place", ["nowhere", "tpu", 3, None])
def test_to_refuses_what_is_no_device(place: Any, tiny: Any) -> None:
    with pytest.raises((InputError, russet.errors.DeviceError)):
        tiny.to("cuda:99" if place is None else place)
    assert tiny.device == torch.device("cpu")
    assert tiny("a horse", **FAST).images.shape == (1, 64, 64, 3)


def test_to_obeys_a_precision(tiny_folder: Any) -> None:
    pipe = russet.DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.to(torch.bfloat16) is pipe
    assert {network.dtype for network in pipe.networks.values()} == {torch.bfloat16}
    output = pipe("a horse", **FAST)
    assert output.plan.why("dtype.unet").by == "user"
    assert output.images.shape == (1, 64, 64, 3)


def test_a_component_given_in_its_own_precision_keeps_it(tiny_folder: Any, tiny: Any) -> None:
    pipe = russet.DiffusionPipeline.from_pretrained(
        tiny_folder, vae=tiny.vae, safety_checker=None, torch_dtype=torch.bfloat16
    )
    assert pipe.unet.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32


def test_a_picture_that_cannot_fit_is_refused_at_once_with_the_largest_that_would(tiny: Any) -> None:
    began = time.perf_counter()
    with pytest.raises(DoesNotFit, match=r"the largest .* that fits is \d+×\d+"):
        tiny("a horse", height=2**20, width=2**20, num_inference_steps=1)
    assert time.perf_counter() - began < 10  # a moment on an idle machine; a search size by size takes minutes
    assert tiny("a horse", **FAST).images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("name", ["device_map", "custom_pipeline", "quantization_config", "low_cpu_mem_usage"])
def test_an_argument_of_from_pretrained_that_russet_lacks_is_named(name: str, tiny_folder: Any) -> None:
    with pytest.raises(UnsupportedArgument, match=f"Diffusers has '{name}'"):
        russet.DiffusionPipeline.from_pretrained(tiny_folder, **{name: False})


def test_low_cpu_mem_usage_asks_for_what_russet_always_does(tiny_folder: Any) -> None:
    pipe = russet.DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None, low_cpu_mem_usage=True)
    assert pipe.unet.dtype == torch.float32
