"""What only a GPU can prove about memory: the peak is predicted before it is taken, and too little of it never met."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import russet
from russet.errors import DoesNotFit
from russet.planning import reference_models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPT = "a photo of an astronaut riding a horse on mars"
HOLD = """
import sys, torch
free = torch.cuda.mem_get_info()[0]
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


def stable_diffusion() -> Any:
    """Stable Diffusion 1.5's networks with random weights in half precision, on the GPU."""
    torch.manual_seed(0)
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with torch.device("cuda"):
        networks = {
            "unet": russet.UNet2DConditionModel.from_config(reference_models.SD15_UNET).half(),
            "vae": russet.AutoencoderKL.from_config(
                {**reference_models.VAE, **levels, "scaling_factor": 0.18215}
            ).half(),
            "text_encoder": russet.CLIPTextModel.from_config(reference_models.CLIP_L).half(),
        }
    parts = russet.DiffusionPipeline.from_pretrained("mini")
    pipe = russet.StableDiffusionPipeline(
        **networks, tokenizer=parts.tokenizer, scheduler=parts.scheduler, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda")


@pytest.fixture(scope="module")
def full_size() -> Any:
    pipe = stable_diffusion()
    draw(pipe)  # libraries take memory of their own when they are first used
    return pipe


@pytest.fixture
def own() -> Any:
    """The same, where a test leaves its networks elsewhere."""
    return stable_diffusion()


def draw(pipe: Any, size: tuple[int, int] = (512, 512), images: int = 1) -> Any:
    height, width = size
    return pipe(
        PROMPT,
        height,
        width,
        num_images_per_prompt=images,
        num_inference_steps=3,  # so that calls are recorded, where they are
        seed=0,
        output_type="np",
    )


def weights_there(pipe: Any) -> int:
    weights = [w for network in pipe.networks.values() for w in network.parameters() if w.is_cuda]
    return sum(weight.numel() * weight.element_size() for weight in weights)


@contextlib.contextmanager
def another_program(leaves: int) -> Iterator[None]:
    """Another process takes the GPU's memory but for ``leaves`` bytes, for as long as the block lasts."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(leaves)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        yield
    finally:
        other.stdin.close()
        other.wait()
        other.stdout.close()


@pytest.mark.parametrize("images", [1, 4, 16])
@pytest.mark.parametrize("size", [(256, 256), (512, 512), (768, 768), (1024, 1024), (512, 2048)], ids=str)
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(
    size: tuple[int, int], images: int, full_size: Any
) -> None:
    full_size.graphs.clear()  # as a process begins that draws this alone
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    foreign = torch.cuda.memory_allocated() - weights_there(full_size)
    torch.cuda.reset_peak_memory_stats()
    output = draw(full_size, size, images)
    measured, predicted = torch.cuda.max_memory_allocated() - foreign, output.plan.peak
    print(f"\n{size} x{images}: predicted {predicted / 1e9:.3f} / measured {measured / 1e9:.3f} GB")
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_the_peak_of_offload_is_predicted_too(mode: str, own: Any) -> None:
    getattr(own, f"enable_{mode}_cpu_offload")(device="cuda")
    draw(own)
    torch.cuda.empty_cache()
    foreign = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = draw(own, images=4)
    measured, predicted = torch.cuda.max_memory_allocated() - foreign, output.plan.peak
    print(f"\n{mode}: predicted {predicted / 1e9:.3f} / measured {measured / 1e9:.3f} GB")
    assert predicted == pytest.approx(measured, rel=0.1)


def test_with_little_memory_fewer_pictures_are_made_at_once(full_size: Any) -> None:
    roomy = full_size.plan(num_images=16)
    with another_program(leaves=10**9):
        output = draw(full_size, images=16)
    assert np.isfinite(output.images).all()
    assert output.plan.micro_batch < roomy.micro_batch


def test_with_less_than_that_networks_take_turns_on_the_gpu_and_come_back(own: Any) -> None:
    draw(own)
    with another_program(leaves=5 * 10**7):
        output = draw(own)
        assert output.plan.offload is not None
        assert np.isfinite(output.images).all()
    output = draw(own)
    assert output.plan.offload is None
    assert np.isfinite(output.images).all()


def test_what_cannot_fit_is_refused_before_anything_is_taken(full_size: Any) -> None:
    with another_program(leaves=2 * 10**9):
        before = torch.cuda.memory_reserved()
        with pytest.raises(DoesNotFit, match="largest of this shape that fits is"):
            draw(full_size, (16384, 16384))
        assert torch.cuda.memory_reserved() == before
    assert draw(full_size).images.shape == (1, 512, 512, 3)


def test_memory_that_the_process_uses_for_something_else_is_not_counted_on(full_size: Any) -> None:
    torch.cuda.empty_cache()
    before = full_size.plan().facts
    held = torch.empty(4 * 2**30, dtype=torch.uint8, device="cuda")
    with_it = full_size.plan().facts
    del held
    cached = full_size.plan().facts
    assert before.budget - with_it.budget == pytest.approx(0.92 * 4 * 2**30, rel=0.01)
    assert cached.budget == pytest.approx(before.budget, rel=0.01)
