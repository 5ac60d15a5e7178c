"""What networks are given on a virtual Mac: parts of larger tensors, other precisions, weights in another layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from russet import DiffusionPipeline, passes
from russet.generate.denoiser import UNetCall
from russet.hardware.facts import mac
from russet.models.clip_vision import CLIPVisionModelWithProjection
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL
from russet.passes.base import Choices
from russet.passes.timestep_embeddings import TimestepCache
from russet.planning.plan import Request, plan
from russet.planning.workload import Workload

from ..families import answer, in_form
from .virtual_mps import VirtualMac

NEW = ("scalar-views", "strided-convolution", "sliced-channels", "mixed-operands", "long-matrix")

UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
TOLD = {
    "time_cond_proj_dim": 16,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}
VAE: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 16,
    "image_size": 32,
    "patch_size": 8,
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(cls: Any, config: dict[str, Any], **changes: Any) -> Any:
    torch.manual_seed(0)
    return cls(**config, **changes).requires_grad_(False)


# -- parts of larger tensors


def unet_of_some_channels(device: str) -> Tensor:
    unet = made(UNet2DConditionModel, UNET).to(device)
    return unet(noise(2, 8, 16, 16).to(device).chunk(2, dim=1)[1], 500, noise(2, 7, 32).to(device)).sample


def decoded_mean(device: str) -> Tensor:
    vae = made(AutoencoderKL, VAE).to(device)
    return vae.decode(vae.encode(noise(2, 3, 32, 32).to(device)).latent_dist.mode()).sample


def decoded_mean_without_a_convolution_before(device: str) -> Tensor:
    vae = made(AutoencoderKL, VAE, use_post_quant_conv=False).to(device)
    return vae.decode(noise(2, 8, 16, 16).to(device)[:, 4:]).sample


def encoded_picture_with_alpha(device: str) -> Tensor:
    vae = made(AutoencoderKL, VAE).to(device)
    return vae.encode(noise(2, 4, 32, 32).to(device)[:, :3]).latent_dist.mean


def encoded_in_tiles(device: str) -> Tensor:
    vae = made(AutoencoderKL, VAE).to(device)
    vae.enable_tiling(16, 4)
    return vae.encode(noise(2, 4, 32, 32).to(device)[:, :3]).latent_dist.mean


def seen_picture_with_alpha(device: str) -> Tensor:
    vision = made(CLIPVisionModelWithProjection, VISION).to(device)
    return vision(noise(2, 4, 32, 32).to(device)[:, :3]).image_embeds


PARTS = [
    unet_of_some_channels,
    decoded_mean,
    decoded_mean_without_a_convolution_before,
    encoded_picture_with_alpha,
    encoded_in_tiles,
    seen_picture_with_alpha,
]


@pytest.mark.parametrize("compute", PARTS, ids=lambda compute: compute.__name__)
def test_some_channels_of_a_tensor_come_right_through_a_network(compute):
    expected = compute("cpu")
    with VirtualMac(bugs=["sliced-channels"]):
        assert torch.allclose(compute("mps").cpu(), expected, rtol=1e-4, atol=1e-5)


# -- other precisions


def told_unet(dtype: torch.dtype) -> Tensor:
    """A half-precision UNet's answer where everything that it is given has that dtype."""
    unet = made(UNet2DConditionModel, UNET, **TOLD).half().to("mps")
    maps = [(2, 32, 16, 16), (2, 32, 16, 16), (2, 32, 8, 8), (2, 64, 8, 8)]

    def given(*shape: int, seed: int = 0) -> Tensor:
        return noise(*shape, seed=seed).half().to("mps", dtype)  # rounded alike

    answer: Tensor = unet(
        given(2, 4, 16, 16),
        torch.tensor(500.0, dtype=dtype),
        given(2, 7, 32, seed=1),
        timestep_cond=given(2, 16, seed=2),
        added_cond_kwargs={
            "text_embeds": given(2, 32, seed=3),
            "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]] * 2).to("mps", dtype),
        },
        down_block_additional_residuals=[given(*shape, seed=4) for shape in maps],
        mid_block_additional_residual=given(2, 64, 8, 8, seed=5),
    ).sample
    assert answer.dtype == torch.float16
    return answer.cpu()


def test_whatever_a_half_precision_unet_is_told_takes_its_precision_first():
    with VirtualMac(bugs=["mixed-operands"]):
        assert torch.equal(told_unet(torch.float32), told_unet(torch.float16))


def test_what_is_computed_of_a_text_and_times_beforehand_has_the_unets_precision():
    with VirtualMac(bugs=["mixed-operands"]):
        unet = made(UNet2DConditionModel, UNET, time_cond_proj_dim=16).half().to("mps")
        x, text, scale = noise(2, 4, 16, 16).to("mps"), noise(2, 7, 32).to("mps"), noise(1, 16).to("mps")
        values = {"timestep_embeddings": "precomputed", "prompt_cache": "keys and values", "offload": None}
        passes.apply(unet, "unet", Choices({**passes.OFF, **values}, rows=2))
        rows, times = (
            {"encoder_hidden_states": text, "timestep_cond": scale},
            TimestepCache(unet, [900, 500], scale[:1]),
        )
        call = UNetCall(unet, rows, prompt_cache="keys and values", times=times)
        with torch.no_grad():
            assert times(500) is not None
            assert call(x, 500).isfinite().all()


def test_pictures_and_latents_take_the_precision_of_an_autoencoder_and_of_a_vision_tower():
    with VirtualMac(bugs=["mixed-operands"]):
        vae = made(AutoencoderKL, VAE).half().to("mps")
        assert vae.decode(vae.encode(noise(1, 3, 16, 16).to("mps")).latent_dist.mean.float()).sample.dtype == vae.dtype
        vision = made(CLIPVisionModelWithProjection, VISION).half().to("mps")
        assert vision(noise(1, 3, 32, 32).to("mps")).image_embeds.dtype == vision.dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_embeddings_and_latents_of_another_precision_draw_the_same_picture(dtype):
    other = torch.float32 if dtype == torch.float16 else torch.float16

    def drawn(device: str, given: torch.dtype) -> Tensor:
        pipe = DiffusionPipeline.from_pretrained("mini", torch_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        text, latents = noise(1, 77, pipe.text_encoder.config.hidden_size).half(), noise(1, 4, 8, 8, seed=1).half()
        x = pipe.to(device)(
            prompt_embeds=text.to(given),
            negative_prompt_embeds=torch.zeros_like(text).to(given),
            latents=latents.to(given),
            height=64,
            width=64,
            num_inference_steps=2,
            output_type="pt",
        ).images
        return torch.as_tensor(x).cpu()

    with VirtualMac(bugs=NEW):
        assert torch.equal(drawn("mps", other), drawn("mps", dtype))


# -- weights in another layout


def strided(network: nn.Module) -> nn.Module:
    """Weights as a pickled checkpoint may have them: transposed views."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    return network


def channels_last(network: nn.Module) -> nn.Module:
    return network.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", [strided, channels_last])
def test_convolution_weights_are_contiguous_on_mps_while_they_work(change):
    """However a user has laid them out before a run, or between two."""
    x, text = noise(1, 4, 16, 16), noise(1, 7, 32)
    unet = made(UNet2DConditionModel, UNET)
    expected = unet(x, 500.0, text).sample
    work = Workload.of(unet=unet.config, vae=VAE, width=32, height=32, rows=1)
    chosen = plan(mac("M1", memory_gib=16), work, Request(dtype="float32"))
    with VirtualMac(bugs=["strided-convolution"]):
        unet.to("mps")
        for _ in range(2):
            change(unet)
            assert not unet.conv_in.weight.is_contiguous()
            with in_form(chosen, unet), torch.no_grad():
                assert all(m.weight.is_contiguous() for m in unet.modules() if isinstance(m, nn.Conv2d))
                found = answer(chosen, unet, x.to("mps"), text.to("mps"))
            assert torch.allclose(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_picture_with_every_newer_defect_is_that_of_a_mac_without(dtype):
    def drawn() -> Tensor:
        pipe = DiffusionPipeline.from_pretrained("mini", torch_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.to(memory_format=torch.channels_last)  # as Diffusers' guides advise
        options: dict[str, Any] = {"num_inference_steps": 2, "num_images_per_prompt": 2, "seed": 7}
        return torch.as_tensor(pipe.to("mps")("a red apple", 64, 64, output_type="pt", **options).images).cpu()

    with VirtualMac(bugs=()):
        expected = drawn()
    with VirtualMac(bugs=NEW):
        assert torch.equal(drawn(), expected)
