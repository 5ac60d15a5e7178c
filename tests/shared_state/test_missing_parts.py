"""What may be absent: a VAE where latents come out, and a place to write progress to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import russet
from russet.errors import InputError

FAST: dict[str, Any] = {"num_inference_steps": 2, "seed": 1}


@pytest.fixture
def blind(tiny_folder: Path) -> Any:
    """The tiny pipeline without a VAE."""
    pipe = russet.DiffusionPipeline.from_pretrained(tiny_folder, vae=None, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_without_a_vae_latents_are_those_of_the_whole_pipeline(blind: Any, tiny: Any) -> None:
    expected = tiny("a horse", output_type="latent", **FAST).images
    assert torch.equal(blind("a horse", output_type="latent", **FAST).images, expected)
    again = type(blind)(**blind.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again("a horse", height=64, width=64, output_type="latent", **FAST).images, expected)


def test_without_a_vae_the_latents_of_any_size_come_out(blind: Any, tiny: Any) -> None:
    options = {"height": 96, "width": 48, "output_type": "latent", **FAST}
    assert torch.equal(blind("a horse", **options).images, tiny("a horse", **options).images)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_without_a_vae_pictures_are_refused_before_any_work(output_type: str, blind: Any) -> None:
    steps: list[int] = []
    with pytest.raises(InputError, match=r"no VAE.*output_type=\"latent\""):
        blind("a horse", output_type=output_type, callback_on_step_end=lambda *a: steps.append(1), **FAST)
    assert steps == []


def test_without_a_vae_a_preview_needs_one(blind: Any, tiny: Any) -> None:
    latents = blind("a horse", output_type="latent", **FAST).images
    with pytest.raises(InputError, match="no VAE"):
        blind.preview(latents)
    assert blind.preview(latents, tiny.vae)[0].size == (64, 64)


def test_without_a_vae_a_pipeline_plans_moves_offloads_and_is_saved(blind: Any, tiny: Any, tmp_path: Path) -> None:
    assert blind.plan().peak <= tiny.plan().peak
    assert blind.vae_scale_factor == 8
    expected = blind("a horse", output_type="latent", **FAST).images
    blind.enable_model_cpu_offload(device="cpu")
    assert torch.equal(blind("a horse", output_type="latent", **FAST).images, expected)
    blind.save_pretrained(tmp_path / "saved")
    assert russet.DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None).vae is None


def test_a_vae_may_be_taken_away_and_put_back(tiny: Any) -> None:
    vae, expected = tiny.vae, tiny("a horse", output_type="pt", **FAST).images
    tiny.vae = None
    assert tiny("a horse", output_type="latent", **FAST).images.shape == (1, 4, 8, 8)
    tiny.vae = vae
    assert torch.equal(tiny("a horse", output_type="pt", **FAST).images, expected)


def test_without_stderr_pictures_are_drawn(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.set_progress_bar_config()
    monkeypatch.setattr(sys, "stderr", None)
    assert tiny("a horse " * 100, output_type="pt", **FAST).images.shape == (1, 3, 64, 64)  # a warning, too


def test_without_stderr_pipelines_are_loaded_and_saved(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    pipe = russet.DiffusionPipeline.from_pretrained(tiny_folder)
    pipe.save_pretrained(tmp_path / "saved")
    pipe.to("cpu")("a horse", output_type="latent", **FAST)


def test_without_stderr_a_bar_that_writes_elsewhere_is_shown(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with open(tmp_path / "bar.txt", "w") as file:
        tiny.set_progress_bar_config(file=file)
        tiny("a horse", output_type="latent", **FAST)
    assert "100%" in (tmp_path / "bar.txt").read_text()
