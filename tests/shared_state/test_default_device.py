"""A default device that the user has set says where the user's tensors go; what Russet computes is where it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import russet
from russet.schedulers import names as samplers

from ..devices.virtual_mps import VirtualMac

FAST = {"num_inference_steps": 2, "output_type": "np", "seed": 1}

pytestmark = pytest.mark.skipif(not hasattr(torch, "set_default_device"), reason="this torch has one device")


@pytest.fixture
def by_default() -> Iterator[None]:
    """The device ``meta``, which has no values: whatever is made there by mistake is found out."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def opened(folder: Any) -> Any:
    pipe = russet.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def expected(tiny_folder: Path) -> np.ndarray:
    return opened(tiny_folder)("a horse", **FAST).images


def test_a_pipeline_is_loaded_and_draws(expected: np.ndarray, by_default: None, tiny_folder: Path) -> None:
    assert np.array_equal(opened(tiny_folder)("a horse", **FAST).images, expected)


def test_a_single_file_is_written_loaded_and_draws(
    expected: np.ndarray, by_default: None, tiny_folder: Path, tmp_path: Path
) -> None:
    opened(tiny_folder).save_single_file(tmp_path / "one.safetensors")
    pipe = russet.StableDiffusionPipeline.from_single_file(tmp_path / "one.safetensors", config=tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(pipe("a horse", **FAST).images, expected)


def test_a_folder_is_written_and_loaded(
    expected: np.ndarray, by_default: None, tiny_folder: Path, tmp_path: Path
) -> None:
    opened(tiny_folder).save_pretrained(tmp_path / "saved", safe_serialization=False)
    assert np.array_equal(opened(tmp_path / "saved")("a horse", **FAST).images, expected)


def test_a_component_is_loaded_with_values(by_default: None, tiny_folder: Path) -> None:
    unet = russet.UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    assert {value.device.type for value in unet.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("name", samplers.list_samplers())
def test_every_sampler_draws(name: str, tiny: Any) -> None:
    options: dict[str, Any] = {**FAST, "num_inference_steps": 4, "output_type": "latent"}
    config = tiny.scheduler.config
    tiny.scheduler = samplers.make(name, config)
    expected = tiny("a horse", **options).images
    torch.set_default_device("meta")
    try:
        tiny.scheduler = samplers.make(name, config)
        found = tiny("a horse", **options).images
        tiny.scheduler.set_timesteps(4)
        assert tiny.scheduler.timesteps.device.type == tiny.scheduler.sigmas.device.type == "cpu"
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


def test_a_users_own_loop_runs(tiny: Any, by_default: None) -> None:
    scheduler = russet.EulerAncestralDiscreteScheduler.from_config(tiny.scheduler.config)
    scheduler.set_timesteps(3)
    x = torch.zeros(1, 4, 8, 8, device="cpu")
    noisy = scheduler.add_noise(x, torch.ones_like(x), 500)
    for t in scheduler.timesteps:
        noisy = scheduler.step(noisy, t, noisy, generator=torch.Generator("cpu").manual_seed(0)).prev_sample
    assert noisy.device.type == "cpu"


def test_callbacks_previews_and_the_tokenizer_have_values(tiny: Any, by_default: None) -> None:
    seen: list[float] = []

    def look(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> None:
        seen.append(float(t))
        assert pipe.preview(tensors["latents"])[0].size == (8, 8)

    tiny("a horse", callback_on_step_end=look, **FAST)
    assert len(seen) >= 2
    assert tiny.tokenizer("a horse").input_ids.device.type == "cpu"


def test_a_pipeline_that_is_loaded_where_mps_is_the_default_draws_on_the_cpu_and_on_the_mac(
    expected: np.ndarray, tiny_folder: Path, psnr: Any
) -> None:
    from torch.utils._device import DeviceContext  # torch.set_default_device does not know of the virtual device

    with VirtualMac():
        with DeviceContext(torch.device("mps")):
            pipe = opened(tiny_folder)
            found = pipe("a horse", **FAST).images
        on_the_mac = pipe.to("mps", torch.float32)("a horse", **FAST).images
    assert psnr(found, expected) > 100
    assert psnr(on_the_mac, expected) > 60
