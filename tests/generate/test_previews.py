"""Previews: small pictures of latents, by a linear map or by a tiny autoencoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from russet.errors import ArgumentTypeError, InputError
from russet.models.tiny_vae import AutoencoderTiny

FAST = {"num_inference_steps": 3, "seed": 1}


def test_a_preview_has_the_colours_of_the_picture_and_a_pixel_for_each_latent(shared_mini: Any, psnr: Any) -> None:
    prompts = ["a red apple on a table", "a photo of a cat on a blue background"]
    latents = shared_mini(prompts, num_inference_steps=6, guidance_scale=5.0, seed=4, output_type="latent").images
    whole = shared_mini.vae.decode(latents / shared_mini.vae.config.scaling_factor).sample
    small = torch.nn.functional.avg_pool2d(whole / 2 + 0.5, 8).clamp(0, 1).movedim(1, -1).detach()
    for picture, wanted in zip(shared_mini.preview(latents), small, strict=True):
        assert picture.size == (32, 32)
        assert psnr(np.asarray(picture) / 255, wanted) > 18
    other = shared_mini.preview(latents.flip(0))[0]
    assert psnr(np.asarray(other) / 255, small[0]) < 12


def test_a_callback_may_look_at_the_foreseen_picture_after_every_call(tiny: Any) -> None:
    seen: list[Image.Image] = []

    def look(pipe: Any, index: int, t: Any, tensors: Any) -> dict[str, Any]:
        seen.extend(pipe.preview(tensors["pred_original_sample"]))
        return tensors  # as programs written for Diffusers do: nothing is changed

    plain = tiny("a horse", output_type="np", **FAST).images
    drawn = tiny(
        "a horse",
        output_type="np",
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
        **FAST,
    ).images
    assert np.array_equal(plain, drawn)
    assert [picture.size for picture in seen] == [(8, 8)] * tiny.num_timesteps


def test_the_last_foreseen_picture_is_the_picture_without_noise_left(tiny: Any) -> None:
    import russet

    tiny.scheduler = russet.EulerDiscreteScheduler.from_config(tiny.scheduler.config)
    seen: list[torch.Tensor] = []

    def look(pipe: Any, index: int, t: Any, tensors: Any) -> None:
        seen.append(tensors["pred_original_sample"])

    given = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["pred_original_sample"]}
    latents = tiny("a horse", output_type="latent", **given, **FAST).images
    assert torch.allclose(seen[-1], latents, atol=1e-4)
    assert not torch.allclose(seen[0], latents, atol=1e-2)


def test_what_a_callback_was_shown_to_look_at_cannot_be_replaced(tiny: Any) -> None:
    with pytest.raises(InputError, match="pred_original_sample is only shown"):
        tiny(
            "a horse",
            callback_on_step_end=lambda *_: {"pred_original_sample": torch.zeros(1, 4, 8, 8)},
            callback_on_step_end_tensor_inputs=["pred_original_sample"],
            **FAST,
        )


def test_the_map_is_fitted_once_for_each_vae(tiny: Any) -> None:
    calls: list[int] = []
    hook = tiny.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    latents = torch.randn(1, 4, 8, 8)
    first, again = tiny.preview(latents)[0], tiny.preview(latents)[0]
    hook.remove()
    assert len(calls) == 1
    assert np.array_equal(np.asarray(first), np.asarray(again))
    torch.manual_seed(1)
    tiny.vae = type(tiny.vae)(tiny.vae.config)
    assert not np.array_equal(np.asarray(first), np.asarray(tiny.preview(latents)[0]))


def test_a_tiny_autoencoder_decodes_previews_at_full_size(tiny: Any) -> None:
    torch.manual_seed(0)
    small = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    latents = torch.randn(2, 4, 8, 8)
    pictures = tiny.preview(latents, vae=small)
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    tiny.vae = small
    for given, own in zip(pictures, tiny.preview(latents), strict=True):
        assert np.array_equal(np.asarray(given), np.asarray(own))


def test_previews_work_while_weights_rest_elsewhere(tiny: Any) -> None:
    latents = torch.randn(1, 4, 8, 8)
    plain = np.asarray(tiny.preview(latents)[0])
    for offload in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        pipe = type(tiny)(**tiny.components, requires_safety_checker=False)
        getattr(pipe, offload)(device="cpu")
        assert np.abs(np.asarray(pipe.preview(latents)[0]).astype(int) - plain).max() <= 1


def test_latents_that_are_not_finite_do_not_stop_a_run(tiny: Any) -> None:
    latents = torch.randn(1, 4, 8, 8)
    latents[0, :, 0, 0] = float("nan")
    latents[0, :, 0, 1] = float("inf")
    pixels = np.asarray(tiny.preview(latents)[0])
    assert np.array_equal(pixels[0, 0], pixels[0, 1])


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 3, 8, 8), (1, 4, 0, 8)])
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...], tiny: Any) -> None:
    with pytest.raises(InputError, match=r"\[B, 4, h, w\]"):
        tiny.preview(torch.zeros(shape))
    with pytest.raises(ArgumentTypeError, match="tensor"):
        tiny.preview(None)
