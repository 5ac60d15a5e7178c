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
from .virtual_mps import VirtualMac

FAST: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np", "seed": 3, "guidance_scale": 3.0}
MACS = {
    "M1 16 GB, macOS 15, torch 2.13": {"chip": "M1", "memory_gib": 16, "macos": "15.0", "torch": "2.13.0"},
    "M1 8 GB, macOS 14.5, torch 2.12": {"chip": "M1", "memory_gib": 8, "macos": "14.5", "torch": "2.12.1"},
    "M3 Max 64 GB, macOS 15, torch 2.5": {"chip": "M3 Max", "memory_gib": 64, "macos": "15.0", "torch": "2.5.1"},
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


def given(kind: str) -> dict[str, Any]:
    return {**FAST, "image": photo(), "strength": 0.6} if "Img2Img" in kind else {**FAST, "height": 64, "width": 64}


@pytest.mark.parametrize("kind", [TEXT_TO_IMAGE, IMAGE_TO_IMAGE])
@pytest.mark.parametrize("name", MACS)
def test_xl_in_half_precision_makes_the_cpus_picture(name: str, kind: str, psnr: Any) -> None:
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


@pytest.mark.parametrize("name", MACS)
def test_a_picture_of_a_picture_in_half_precision_is_the_cpus(name: str, psnr: Any) -> None:
    def made(pipe: Any) -> Any:
        pipe.set_progress_bar_config(disable=True)
        return pipe("a red apple", image=photo(), strength=0.6, num_inference_steps=5, seed=3, output_type="np")

    def opened(dtype: torch.dtype) -> Any:
        return russet.StableDiffusionImg2ImgPipeline.from_pretrained("mini", torch_dtype=dtype)

    expected = made(opened(torch.float32)).images
    with VirtualMac(**MACS[name]):
        found = made(opened(torch.float16).to("mps"))
    assert not found.notes
    assert psnr(found.images, expected) > 40
