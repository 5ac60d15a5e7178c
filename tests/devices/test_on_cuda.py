"""What only a GPU can prove: pictures do not depend on the device, and memory is predicted before it is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import russet
from russet.devices import published
from russet.errors import DoesNotFit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPT = "a photo of an astronaut riding a horse on mars"
SETTINGS = {"num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "np"}


def embedded(*, dtype: torch.dtype | None = None, device: str = "cuda") -> Any:
    pipe = russet.DiffusionPipeline.from_pretrained("mini", torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@pytest.fixture(scope="module")
def single() -> Any:
    return embedded(dtype=torch.float32)


@pytest.fixture(scope="module")
def on_cpu() -> Any:
    return embedded(device="cpu")(PROMPT, seed=42, **SETTINGS).images


def test_the_same_seed_gives_the_same_picture_on_cpu_and_cuda(single: Any, on_cpu: Any, psnr: Any) -> None:
    assert psnr(on_cpu, single(PROMPT, seed=42, **SETTINGS).images) >= 50


def test_half_precision_stays_close_and_is_the_default(on_cpu: Any, psnr: Any) -> None:
    pipe = embedded()
    assert pipe.dtype == torch.float16
    assert psnr(on_cpu, pipe(PROMPT, seed=42, **SETTINGS).images) >= 30


def test_one_and_eight_at_a_time_give_the_same_pictures(single: Any, psnr: Any) -> None:
    together = single(PROMPT, num_images_per_prompt=8, seed=42, **SETTINGS).images
    for i in (0, 7):
        assert psnr(together[i], single(PROMPT, seed=42 + i, **SETTINGS).images[0]) >= 60


def test_sliced_and_fused_attention_give_the_same_picture(psnr: Any) -> None:
    pipe = embedded(dtype=torch.float32)
    fused = pipe(PROMPT, seed=42, **SETTINGS).images
    pipe.enable_attention_slicing("max")
    assert psnr(fused, pipe(PROMPT, seed=42, **SETTINGS).images) >= 60


@pytest.mark.parametrize("mode", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloaded_networks_draw_the_same_picture_and_rest_on_the_cpu(mode: str, single: Any, psnr: Any) -> None:
    wanted = single(PROMPT, seed=42, **SETTINGS).images
    pipe = embedded(dtype=torch.float32, device="cpu")
    getattr(pipe, mode)(device="cuda")
    assert psnr(wanted, pipe(PROMPT, seed=42, **SETTINGS).images) >= 60
    assert {next(network.parameters()).device.type for network in pipe.networks.values()} == {"cpu"}


@pytest.fixture(scope="module")
def full_size() -> Any:
    """Stable Diffusion 1.5's networks with random weights in half precision, on the GPU."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda"):
            networks = {
                "unet": russet.UNet2DConditionModel.from_config(published.SD15_UNET),
                "vae": russet.AutoencoderKL.from_config(
                    {
                        **published.VAE,
                        "down_block_types": ["DownEncoderBlock2D"] * 4,
                        "up_block_types": ["UpDecoderBlock2D"] * 4,
                        "scaling_factor": 0.18215,
                    }
                ),
                "text_encoder": russet.CLIPTextModel.from_config(published.CLIP_L),
            }
    finally:
        torch.set_default_dtype(before)
    parts = russet.DiffusionPipeline.from_pretrained("mini")
    pipe = russet.StableDiffusionPipeline(
        **networks, tokenizer=parts.tokenizer, scheduler=parts.scheduler, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda")


@pytest.mark.parametrize("images", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(512, 512), (768, 768), (1024, 1024), (512, 2048)], ids=str)
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(
    size: tuple[int, int], images: int, full_size: Any
) -> None:
    height, width = size
    call = {
        "prompt": PROMPT,
        "num_images_per_prompt": images,
        "height": height,
        "width": width,
        "num_inference_steps": 2,
    }
    full_size(**call, output_type="np")  # the first call of a shape tries out algorithms, which takes memory of its own
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    output = full_size(**call, output_type="np")
    measured = torch.cuda.max_memory_allocated()
    predicted = output.plan.peak
    print(f"\n{height}x{width} x{images}: measured {measured / 1e9:.3f} GB, predicted {predicted / 1e9:.3f}")
    assert predicted == pytest.approx(measured, rel=0.1)


def test_too_little_memory_is_predicted_and_not_met(full_size: Any) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    hold = torch.empty(torch.cuda.mem_get_info()[0] - 3 * 2**30, dtype=torch.uint8, device="cuda")
    try:
        output = full_size(PROMPT, num_images_per_prompt=16, num_inference_steps=1, output_type="np")
        assert np.isfinite(output.images).all()
        with pytest.raises(DoesNotFit, match="largest"):
            full_size(PROMPT, height=32768, width=32768, num_inference_steps=1)
    finally:
        del hold
        torch.cuda.empty_cache()
    assert full_size(PROMPT, num_inference_steps=1, output_type="np").images.shape == (1, 512, 512, 3)
    assert torch.cuda.max_memory_allocated() < total
