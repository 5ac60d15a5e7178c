"""A pipeline written as one file, and read again, by Russet and by Diffusers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from russet.checkpoints import atomic_directory
from russet.checkpoints.formats.weight_files import open_weights
from russet.checkpoints.layouts import ldm_keys
from russet.checkpoints.single_file.load import single_file
from russet.checkpoints.single_file.save import save_single_file
from russet.errors import ArgumentTypeError, CheckpointError, InputError

from .. import ldm_tiny

NO_WORDS = {"tokenizer": None, "tokenizer_2": None}


def load(path: Path, family: str, **how: Any) -> dict[str, Any]:
    return dict(single_file(path, overrides=NO_WORDS, config=ldm_tiny.configs(family), **how).components)


@pytest.mark.parametrize("family", ldm_tiny.UNETS)
def test_what_is_written_equals_the_original_file(family: str, tmp_path: Path) -> None:
    path = ldm_tiny.write_original(tmp_path / "original.safetensors", family, dtype=torch.float16)
    components = load(path, family, prediction_type="epsilon", dtype=torch.float16)
    save_single_file(components, tmp_path / "written.safetensors")
    original, written = load_file(path), load_file(tmp_path / "written.safetensors")
    for key, value in written.items():
        assert torch.equal(value, original[key]), key
    spare = f"cond_stage_model.model.transformer.resblocks.{ldm_tiny.TEXT_LAYERS - 1}."
    left = [key for key in original.keys() - written.keys() if not ldm_keys.ignored(key) and not key.startswith(spare)]
    assert left == []


@pytest.mark.parametrize(
    ("family", "zero_snr", "markers"),
    [("sd1", False, {"v_pred"}), ("sdxl", True, {"v_pred", "ztsnr"}), ("sd2", False, set())],
)
def test_the_prediction_type_survives_the_way_through_a_file(
    family: str, zero_snr: bool, markers: set[str], tmp_path: Path
) -> None:
    components = load(
        ldm_tiny.write_original(tmp_path / "a.safetensors", family), family, prediction_type="v_prediction"
    )
    if zero_snr:
        scheduler = components["scheduler"]
        components["scheduler"] = type(scheduler).from_config(scheduler.config, rescale_betas_zero_snr=True)
    path = tmp_path / "b.safetensors"
    save_single_file(components, path)
    assert markers == {"v_pred", "ztsnr"} & open_weights(path).tensors.keys()
    config = load(path, family)["scheduler"].config
    assert config.prediction_type == "v_prediction"
    assert config.get("rescale_betas_zero_snr", False) is zero_snr


def test_the_header_says_what_the_model_is(tmp_path: Path) -> None:
    components = load(ldm_tiny.write_original(tmp_path / "a.safetensors", "sd2"), "sd2", prediction_type="v_prediction")
    save_single_file(components, tmp_path / "my model.safetensors")
    with safe_open(tmp_path / "my model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert metadata["modelspec.title"] == "my model"
    assert metadata["format"] == "pt"


def test_networks_on_their_way_are_not_changed_by_saving(tmp_path: Path) -> None:
    components = load(ldm_tiny.write_original(tmp_path / "a.safetensors", "sd1"), "sd1")
    unet = components["unet"].to(memory_format=torch.channels_last)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    save_single_file(components, tmp_path / "b.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(load(tmp_path / "b.safetensors", "sd1")["unet"].conv_in.weight, unet.conv_in.weight)


@pytest.mark.parametrize(
    ("path", "error"),
    [("model.ckpt", InputError), ("model", InputError), (3, ArgumentTypeError), (b"a", ArgumentTypeError)],
)
def test_a_name_that_is_no_safetensors_file_is_refused(path: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        save_single_file({}, path)


@pytest.mark.parametrize("absent", ["unet", "vae", "text_encoder"])
def test_a_missing_network_is_named(absent: str, tmp_path: Path) -> None:
    components = load(ldm_tiny.write_original(tmp_path / "a.safetensors", "sd1"), "sd1")
    with pytest.raises(InputError, match=absent):
        save_single_file({**components, absent: None}, tmp_path / "b.safetensors")


def test_a_save_that_is_cut_short_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    components = load(ldm_tiny.write_original(tmp_path / "a.safetensors", "sd1"), "sd1")
    goal = tmp_path / "b.safetensors"
    goal.write_bytes(b"old")

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(CheckpointError, match="space"):
            save_single_file(components, goal)
    with monkeypatch.context() as patch:
        patch.setattr(atomic_directory, "_move", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            save_single_file(components, goal)
    assert goal.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
