"""Stable Diffusion XL and image to image on virtual Macs in half precision: the pictures of the CPU in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import russet
from russet.text.tokenizer import CLIPTokenizer

from ..conftest import MINI, SCHEDULER, TEXT, UNET, VAE
from ..frozen.test_counts import TEXT as FULL_TEXT
from ..frozen.test_counts import VAE as FULL_VAE
from ..frozen.test_counts import hollow
from .virtual_mps import VirtualMac
from .virtual_mps.kernels import version

FAST: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np", "seed": 3, "guidance_scale": 3.0}
MACS = {
    "M1 16 GB, macOS 15, torch 2.13": {"chip": "M1", "memory_gib": 16, "macos": "15.0", "torch": "2.13.0"},
    "M1 8 GB, macOS 14.5, torch 2.12": {"chip": "M1", "memory_gib": 8, "macos": "14.5", "torch": "2.12.1"},
    "M3 Max 64 GB, macOS 15, torch 2.5": {"chip": "M3 Max", "memory_gib": 64, "macos": "15.0", "torch": "2.5.1"},
}
FULL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}
FULL_SECOND = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
TEXT_TO_IMAGE, IMAGE_TO_IMAGE = "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"


def components() -> dict[str, Any]:
    """Of a tiny XL pipeline with random weights, the same in every call."""
    torch.manual_seed(0)
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = {**UNET, **added, "cross_attention_dim": 72, "projection_class_embeddings_input_dim": 24 + 6 * 8}
    tokenizer = CLIPTokenizer.from_files(MINI / "tokenizer")
    networks = {
        "vae": russet.AutoencoderKL(VAE),
        "text_encoder": russet.CLIPTextModel(TEXT),
        "text_encoder_2": russet.CLIPTextModelWithProjection({**TEXT, "hidden_size": 40, "projection_dim": 24}),
        "unet": russet.UNet2DConditionModel({**unet, "use_linear_projection": True}),
    }
    return {name: network.requires_grad_(False) for name, network in networks.items()} | {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "scheduler": russet.EulerDiscreteScheduler(**{k: v for k, v in SCHEDULER.items() if k != "skip_prk_steps"}),
    }


def xl(kind: str) -> Any:
    pipe = getattr(russet, kind)(**components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def photo() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


def skip_without_torch_2() -> None:
    if version(torch.__version__) < (2, 0):
        pytest.skip("this torch cannot stand for one of torch 2")


def given(kind: str) -> dict[str, Any]:
    return {**FAST, "image": photo(), "strength": 0.6} if "Img2Img" in kind else {**FAST, "height": 64, "width": 64}


@pytest.mark.parametrize("kind", [TEXT_TO_IMAGE, IMAGE_TO_IMAGE])
@pytest.mark.parametrize("name", MACS)
def test_xl_in_half_precision_makes_the_cpus_picture(name: str, kind: str, psnr: Any) -> None:
    skip_without_torch_2()
    expected = xl(kind)("a red horse", negative_prompt="rain", **given(kind)).images
    with VirtualMac(**MACS[name]) as mac:
        pipe = xl(kind).to("mps", torch.float16)
        with mac.measure() as counts:
            found = pipe("a red horse", negative_prompt="rain", **given(kind))
        assert pipe.unet.dtype == torch.float16
        assert counts.kernel_count > 100
    assert not found.notes
    assert psnr(found.images, expected) > 40
    assert np.asarray(expected).std() > 0.01, "a picture without anything in it would be the same anyhow"


def drawn_over(pipe: Any) -> Any:
    """What is made of the photo by a pipeline of the embedded model."""
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red apple", image=photo(), strength=0.6, num_inference_steps=5, seed=3, output_type="np")


def image_to_image(dtype: torch.dtype) -> Any:
    return russet.StableDiffusionImg2ImgPipeline.from_pretrained("mini", torch_dtype=dtype)


@pytest.mark.parametrize("name", MACS)
def test_a_picture_of_a_picture_in_half_precision_is_the_cpus(name: str, psnr: Any) -> None:
    skip_without_torch_2()
    expected = drawn_over(image_to_image(torch.float32)).images
    with VirtualMac(**MACS[name]):
        found = drawn_over(image_to_image(torch.float16).to("mps"))
    assert not found.notes
    assert psnr(found.images, expected) > 40


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_pictures_go_to_the_device_where_weights_are_offloaded_too(offload: str, psnr: Any) -> None:
    skip_without_torch_2()
    expected = drawn_over(image_to_image(torch.float32)).images
    with VirtualMac():
        pipe = image_to_image(torch.float32)
        getattr(pipe, f"enable_{offload}_cpu_offload")(device="mps")
        found = drawn_over(pipe).images
    assert psnr(found, expected) > 90


# -- at full size, on shapes alone


@pytest.mark.parametrize("kind", [TEXT_TO_IMAGE, IMAGE_TO_IMAGE])
def test_xl_at_full_size_takes_the_memory_that_is_predicted(kind: str) -> None:
    """From a picture, the VAE works before the UNet and after it, and what the UNet had copied is free by then."""
    skip_without_torch_2()
    work = {"image": torch.rand(1, 3, 1024, 1024), "strength": 1.0} if kind == IMAGE_TO_IMAGE else {}
    with VirtualMac("M1", memory_gib=64, macos="15.0", torch="2.13.0", shapes_only=True) as mac:
        pipe = getattr(russet, kind)(
            **components()
            | {
                "vae": hollow(russet.AutoencoderKL, FULL_VAE),
                "text_encoder": hollow(russet.CLIPTextModel, FULL_TEXT),
                "text_encoder_2": hollow(russet.CLIPTextModelWithProjection, FULL_SECOND),
                "unet": hollow(russet.UNet2DConditionModel, FULL_UNET),
            }
        ).to("mps", torch.float16)
        pipe.set_progress_bar_config(disable=True)
        with mac.measure() as counts:
            plan = pipe("a cat", num_inference_steps=2, seed=0, output_type="np", **work).plan
    assert 0.98 <= counts.peak / plan.peak <= 1.01
