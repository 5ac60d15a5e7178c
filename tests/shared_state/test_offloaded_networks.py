"""A network that the pipeline has put away is there for everybody who asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import russet

FAST = {"num_inference_steps": 2, "output_type": "np", "seed": 1}
NETWORKS = ("unet", "vae", "text_encoder")


@pytest.fixture
def own(tiny_folder: Path) -> Any:
    pipe = russet.DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["model", "sequential"])
def offloaded(request: pytest.FixtureRequest, own: Any) -> Any:
    """A pipeline that has drawn under offload."""
    getattr(own, f"enable_{request.param}_cpu_offload")(device="cpu")
    own("a horse", **FAST)
    return own


def call(pipe: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        if name == "vae":
            return pipe.vae.decode(torch.ones(1, 4, 8, 8), return_dict=False)[0]
        if name == "text_encoder":
            return pipe.text_encoder(pipe.tokenizer("a horse").input_ids).last_hidden_state
        return pipe.unet(torch.ones(1, 4, 8, 8), 10, torch.ones(1, 77, 32), return_dict=False)[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_called_directly(name: str, offloaded: Any, tiny: Any) -> None:
    assert torch.allclose(call(offloaded, name), call(tiny, name), atol=1e-5)


def test_a_picture_is_encoded_directly(offloaded: Any, tiny: Any) -> None:
    x = torch.ones(1, 3, 64, 64)
    with torch.no_grad():
        found, expected = (pipe.vae.encode(x, return_dict=False)[0].mode() for pipe in (offloaded, tiny))
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_dict_has_values(name: str, offloaded: Any, tiny: Any) -> None:
    found, expected = getattr(offloaded, name).state_dict(), getattr(tiny, name).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_reference_from_before_is_called_directly(name: str, offloaded: Any, tiny: Any) -> None:
    held = getattr(offloaded, name)
    offloaded("a horse", **FAST)
    assert getattr(offloaded, name) is held
    assert torch.allclose(call(offloaded, name), call(tiny, name), atol=1e-5)


def test_a_second_pipeline_of_the_same_parts_draws_and_saves(offloaded: Any, tiny: Any, tmp_path: Path) -> None:
    expected = tiny("a horse", **FAST).images
    other = type(offloaded)(**offloaded.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert np.array_equal(other("a horse", **FAST).images, expected)
    other.save_pretrained(tmp_path / "saved")
    again = russet.DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert np.array_equal(again("a horse", **FAST).images, expected)


def test_a_network_saves_itself(offloaded: Any, tiny: Any, tmp_path: Path) -> None:
    offloaded.vae.save_pretrained(tmp_path / "vae")
    again = russet.AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), tiny.vae.parameters(), strict=True))


def test_two_pipelines_that_share_parts_may_both_offload(own: Any, tiny: Any) -> None:
    expected = tiny("a horse", **FAST).images
    other = type(own)(**own.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    other.enable_model_cpu_offload(device="cpu")
    for pipe in (own, other, own):
        assert np.array_equal(pipe("a horse", **FAST).images, expected)


def test_a_pipeline_draws_while_another_that_shares_its_parts_offloads_them(own: Any, tiny: Any) -> None:
    expected = tiny("a horse", **FAST).images
    other = type(own)(**own.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    own.enable_model_cpu_offload(device="cpu")
    for pipe in (own, other, own, other):
        assert np.array_equal(pipe("a horse", **FAST).images, expected)
