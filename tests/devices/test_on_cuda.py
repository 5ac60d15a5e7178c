"""What only a GPU can prove about pictures: they do not depend on the device, the batch, or how memory is saved."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import russet
from russet.backends.cuda.graphs import Graphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPT = "a photo of an astronaut riding a horse on mars"
SETTINGS = {"num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "np"}
LIMIT = 65504.0  # the largest float16


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


@pytest.fixture
def closeness(psnr: Any) -> Any:
    """PSNR of two pictures in dB; printed, since the number is worth knowing where it is more than enough."""

    def measure(what: str, a: Any, b: Any) -> float:
        found = float(psnr(a, b))
        print(f"\n{what}: {found:.1f} dB")
        return found

    return measure


def places(pipe: Any) -> set[str]:
    return {next(network.parameters()).device.type for network in pipe.networks.values()}


# -- the same picture


def test_a_picture_in_inference_mode_is_the_same_and_so_is_the_next_one_outside_of_it(closeness: Any) -> None:
    pipe = embedded(dtype=torch.float16)
    with torch.inference_mode():
        first = pipe(PROMPT, seed=42, **SETTINGS).images
    assert pipe.graphs._recordings
    assert closeness("in inference mode, outside of it", first, pipe(PROMPT, seed=42, **SETTINGS).images) >= 40


def test_the_same_seed_gives_the_same_picture_on_cpu_and_cuda(single: Any, on_cpu: Any, closeness: Any) -> None:
    assert closeness("float32, cuda against cpu", on_cpu, single(PROMPT, seed=42, **SETTINGS).images) >= 50


def test_half_precision_stays_close_and_is_the_default(on_cpu: Any, closeness: Any) -> None:
    pipe = embedded()
    assert pipe.dtype == torch.float16
    output = pipe(PROMPT, seed=42, **SETTINGS)
    assert output.notes == ()
    assert closeness("float16, cuda against the cpu's float32", on_cpu, output.images) >= 30


def test_noise_in_every_step_is_the_same_on_both(single: Any, closeness: Any) -> None:
    pictures = []
    for pipe in (embedded(dtype=torch.float32), embedded(device="cpu")):
        pipe.scheduler = russet.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        pictures.append(pipe(PROMPT, seed=42, **SETTINGS).images)
    assert closeness("Euler ancestral, float32, cuda against cpu", *pictures) >= 50


def test_one_and_eight_at_a_time_give_the_same_pictures(single: Any, closeness: Any) -> None:
    together = single(PROMPT, num_images_per_prompt=8, seed=42, **SETTINGS)
    assert together.plan.micro_batch == 8
    for i in (0, 7):
        alone = single(PROMPT, seed=42 + i, **SETTINGS).images[0]
        assert closeness(f"float32, picture {i} of 8 against one", together.images[i], alone) >= 60


def test_parts_of_a_batch_give_its_pictures(single: Any, closeness: Any) -> None:
    whole = single(PROMPT, num_images_per_prompt=4, seed=42, **SETTINGS).images
    pipe = embedded(dtype=torch.float32)
    pipe._choose(micro_batch=2)
    output = pipe(PROMPT, num_images_per_prompt=4, seed=42, **SETTINGS)
    assert output.plan.micro_batch == 2
    assert closeness("float32, 2 + 2 against 4", whole, output.images) >= 60


@pytest.mark.parametrize("slices", ["max", "auto", 1])
def test_sliced_and_fused_attention_give_the_same_picture(slices: Any, single: Any, closeness: Any) -> None:
    fused = single(PROMPT, seed=42, **SETTINGS)
    assert fused.plan.attention("unet").kind == "fused"
    pipe = embedded(dtype=torch.float32)
    pipe.enable_attention_slicing(slices)
    output = pipe(PROMPT, seed=42, **SETTINGS)
    assert output.plan.attention("unet").kind == "sliced"
    assert closeness(f"float32, sliced ({slices}) against fused", fused.images, output.images) >= 60


def test_tiles_and_single_pictures_of_the_vae_change_nothing(single: Any, closeness: Any) -> None:
    options = {**SETTINGS, "height": 768, "width": 768, "num_inference_steps": 1}
    whole = single(PROMPT, seed=42, num_images_per_prompt=2, **options).images
    pipe = embedded(dtype=torch.float32)
    pipe.enable_vae_tiling()
    pipe.enable_vae_slicing()
    output = pipe(PROMPT, seed=42, num_images_per_prompt=2, **options)
    assert (output.plan.vae_tile.size, output.plan.vae_batch) == (64, 1)
    assert closeness("float32, decoded in tiles against whole", whole, output.images) >= 30  # each tile has its norms


# -- offload


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloaded_networks_draw_the_same_picture_and_rest_on_the_cpu(mode: str, dtype: Any, closeness: Any) -> None:
    wanted = embedded(dtype=dtype)(PROMPT, seed=42, **SETTINGS).images
    pipe = embedded(dtype=dtype, device="cpu")
    getattr(pipe, mode)(device="cuda")
    for _ in range(2):
        output = pipe(PROMPT, seed=42, **SETTINGS)
        assert places(pipe) == {"cpu"}
        least = 60 if dtype == torch.float32 else 40
        assert closeness(f"{dtype}, {mode} against none", wanted, output.images) >= least
    assert output.plan.why("offload").by == "user"


@pytest.mark.parametrize("mode", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_takes_less_memory_on_the_device(mode: str) -> None:
    def peak(pipe: Any) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated() - weights_on_cuda(pipe)
        torch.cuda.reset_peak_memory_stats()
        pipe(PROMPT, seed=42, num_inference_steps=1, output_type="np")
        return torch.cuda.max_memory_allocated() - before

    pipe = embedded(dtype=torch.float32)
    all_there = peak(pipe)
    getattr(pipe, mode)(device="cuda")
    assert peak(pipe) < all_there


def weights_on_cuda(pipe: Any) -> int:
    weights = [w for network in pipe.networks.values() for w in network.parameters() if w.is_cuda]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def test_a_pipeline_goes_to_the_device_and_back(on_cpu: Any, psnr: Any) -> None:
    pipe = embedded(dtype=torch.float32)
    assert places(pipe) == {"cuda"}
    pipe.to("cpu")
    assert places(pipe) == {"cpu"}
    assert psnr(on_cpu, pipe(PROMPT, seed=42, **SETTINGS).images) >= 60


# -- numbers that stay finite


def test_an_overflowing_unet_goes_on_in_float32_and_says_so(closeness: Any) -> None:
    pipe = embedded(dtype=torch.float16)
    for block in pipe.unet.down_blocks:
        for resnet in block.resnets:
            resnet.conv2.bias.data.fill_(LIMIT)
    output = pipe(PROMPT, seed=42, **SETTINGS)
    assert pipe.unet.dtype == torch.float16
    assert "whole unet in float32" in output.notes[-1]
    assert np.isfinite(output.images).all()
    wanted = pipe.to(torch.float32)(PROMPT, seed=42, **SETTINGS).images
    assert closeness("rescued UNet against float32", wanted, output.images) >= 30


def test_an_overflowing_vae_decodes_in_float32_and_says_so(closeness: Any) -> None:
    pipe = embedded(dtype=torch.float16)
    pipe.vae.decoder.up_blocks[0].resnets[0].conv2.bias.data.fill_(LIMIT)
    pipe.vae.decoder.up_blocks[0].resnets[1].conv2.bias.data.fill_(LIMIT)
    output = pipe(PROMPT, seed=42, **SETTINGS)
    assert pipe.vae.dtype == torch.float16
    assert "whole vae in float32" in output.notes[-1]
    wanted = pipe.to(torch.float32)(PROMPT, seed=42, **SETTINGS).images
    assert closeness("rescued VAE against float32", wanted, output.images) >= 30


def test_the_device_is_asked_now_and_then_and_not_in_every_step(single: Any) -> None:
    waits = {}
    for steps in (4, 9, 14):
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                single(PROMPT, seed=42, num_inference_steps=steps, output_type="latent")
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits[steps] = sum("synchronizing" in str(warning.message) for warning in seen)
    print(waits)
    assert max(waits[14] - waits[9], waits[9] - waits[4]) <= 1  # one look in five steps


# -- the self-test


def test_every_operation_agrees_with_the_cpu() -> None:
    from russet.diagnostics.self_test import self_test

    lines = list(self_test("cuda"))
    assert [str(line) for line in lines if line.verdict in ("wrong", "failed")] == []
    assert len(lines) > 40


def test_fast_paths_and_plain_operations_draw_the_same_picture(psnr: Any) -> None:
    for dtype, least in ((torch.float32, 50), (torch.float16, 30)):
        pipe = embedded(dtype=dtype)
        fast = pipe(PROMPT, seed=42, **SETTINGS)
        assert (fast.plan["ops"], fast.plan["cuda_graphs"]) == ("triton", True)
        pipe.disable_fast_paths()
        plain = pipe(PROMPT, seed=42, **SETTINGS)
        assert (plain.plan["ops"], plain.plan["cuda_graphs"]) == ("eager", False)
        assert psnr(plain.images, fast.images) >= least


def test_recordings_follow_the_prompt_the_size_and_the_weights(psnr: Any) -> None:
    pipe = embedded(dtype=torch.float32)

    def drawn(**changes: Any) -> Any:
        return pipe(**{"prompt": PROMPT, "seed": 1, **SETTINGS, **changes}).images

    calls = [{}, {"prompt": "a red car"}, {"height": 128}, {"guidance_scale": 1.0}, {}, {"prompt": ["a cat", "a dog"]}]
    calls += [{"clip_skip": 1}, {"clip_skip": 1, "prompt": "a cat"}, {"clip_skip": 1}]

    def change(pipe: Any) -> None:
        """In place, which a recording reads, and elsewhere, which makes it another network."""
        pipe.unet.conv_out.bias.data.add_(0.05)
        pipe.text_encoder.text_model.final_layer_norm.bias.data.add_(0.05)

    def replace(pipe: Any) -> None:
        for layer in (pipe.unet.conv_in, pipe.text_encoder.text_model.final_layer_norm):
            layer.weight = torch.nn.Parameter(layer.weight * 0.9, requires_grad=False)

    def story() -> list[Any]:
        pictures = [drawn(**call) for call in calls]
        for alter in (change, replace):
            alter(pipe)
            pictures.append(drawn())
        return pictures

    recorded = story()
    pipe = embedded(dtype=torch.float32)
    pipe.disable_fast_paths()
    plain = story()
    assert [psnr(a, b) >= 50 for a, b in zip(plain, recorded, strict=True)] == [True] * len(plain)


def test_a_recording_keeps_nothing_that_it_was_given() -> None:
    graphs = Graphs()

    def doubled(x: torch.Tensor) -> list[float]:
        (found,) = graphs.run("doubled", lambda x: (2 * x,), [x])
        return [float(value) for value in found]

    for value in range(5):  # the first is no recording, and each later one may lie where the one before it lay
        x = torch.full((2,), float(value), device="cuda")
        assert doubled(x) == [2 * value, 2 * value]
    x.add_(1)
    assert doubled(x) == [10, 10]
    gone = weakref.ref(x)
    del x
    assert gone() is None
