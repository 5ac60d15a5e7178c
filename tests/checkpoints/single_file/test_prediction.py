"""What a model predicts, where its weights cannot say."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from russet.checkpoints.layouts.detection import FileKind
from russet.checkpoints.layouts.ldm_keys import UNET
from russet.checkpoints.single_file.load import single_file
from russet.checkpoints.single_file.prediction import decide_prediction, probe_prediction, read_sidecar
from russet.checkpoints.single_file.save import gathered
from russet.errors import CorruptFile, MissingFile
from russet.models.unet import UNet2DConditionModel

from .. import ldm_tiny

SD1, SD2, XL = FileKind("checkpoint", "sd1"), FileKind("checkpoint", "sd2"), FileKind("checkpoint", "sdxl")
NO_WORDS = {"tokenizer": None, "tokenizer_2": None}


def sgm(scaling: str) -> dict[str, Any]:
    target = f"sgm.modules.diffusionmodules.denoiser_scaling.{scaling}"
    return {"model": {"params": {"denoiser_config": {"params": {"scaling_config": {"target": target}}}}}}


def ldm(**params: Any) -> dict[str, Any]:
    return {"model": {"params": {"unet_config": {}, **params}}}


@pytest.mark.parametrize(
    ("kind", "evidence", "meaning"),
    [
        (SD1, {}, "epsilon"),
        (XL, {}, "epsilon"),
        (FileKind("checkpoint", "sd2", "inpaint"), {}, "epsilon"),
        (SD2, {}, None),
        (SD2, {"requested": "epsilon"}, "epsilon"),
        (SD2, {"requested": "v_prediction", "sidecar": ldm()}, "v_prediction"),
        (SD2, {"sidecar": ldm(parameterization="v")}, "v_prediction"),
        (SD2, {"sidecar": ldm()}, "epsilon"),
        (SD2, {"sidecar": sgm("VScaling")}, "v_prediction"),
        (SD2, {"sidecar": sgm("EpsScaling")}, "epsilon"),
        (SD2, {"sidecar": {"model": ["no", "config"]}}, None),
        (SD2, {"sidecar": ldm(), "metadata": {"modelspec.prediction_type": "v"}}, "epsilon"),
        (SD2, {"metadata": {"modelspec.prediction_type": "v"}}, "v_prediction"),
        (SD2, {"metadata": {"modelspec.predict_key": "epsilon"}}, "epsilon"),
        (SD2, {"metadata": {"modelspec.architecture": "stable-diffusion-v2-768-v"}}, "v_prediction"),
        (SD2, {"metadata": {"modelspec.architecture": "stable-diffusion-v2-512"}}, "epsilon"),
        (SD2, {"metadata": {"modelspec.prediction_type": "nonsense"}}, None),
        (SD2, {"stem": "v2-1_768-ema-pruned"}, "v_prediction"),
        (SD2, {"stem": "768-v-ema"}, "v_prediction"),
        (SD2, {"stem": "512-base-ema"}, "epsilon"),
        (SD2, {"stem": "v2-1_512-nonema-pruned"}, "epsilon"),
        (SD2, {"stem": "sd_turbo"}, "epsilon"),
        (XL, {"names": ["v_pred"]}, "v_prediction"),
        (SD1, {"names": ["v_pred"]}, "v_prediction"),
        (XL, {"metadata": {"modelspec.prediction_type": "v"}}, "v_prediction"),
    ],
)
def test_the_evidence_is_weighed_in_order(kind: FileKind, evidence: dict[str, Any], meaning: str | None) -> None:
    found = decide_prediction(kind, **evidence)
    assert found.meaning == meaning
    assert found.why


def test_yaml_is_read_as_plain_text_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model:\n  params:\n    parameterization: v\n    n: 1e999999999\n")
    assert decide_prediction(SD2, sidecar=read_sidecar(path)).meaning == "v_prediction"
    bombs = {
        "code": "!!python/object/apply:os.system ['true']",
        "list": "- a\n- b",
        "broken": "a: [b",
        "deep": "[" * 20_000,
        "long": "#" * 70_000,
        "laughs": "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(5)) + "<<: [*b1",
    }
    for name, text in bombs.items():
        path.write_text(text)
        with pytest.raises(CorruptFile):
            read_sidecar(path)
        assert name
    with pytest.raises(MissingFile):
        read_sidecar(tmp_path / "absent.yaml")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ldm_tiny.write_original(tmp_path_factory.mktemp("sd2") / "model.safetensors", "sd2")


def scheduler_of(path: Path, family: str = "sd2", **how: Any) -> Any:
    how.setdefault("config", ldm_tiny.configs(family))
    return single_file(path, overrides=NO_WORDS, **how).components["scheduler"]


def test_a_stable_diffusion_2_file_that_says_nothing_is_warned_of(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "russet"):
        scheduler_of(file)
        assert "prediction_type=" in caplog.text
        caplog.clear()
        assert scheduler_of(file, prediction_type="epsilon").config.prediction_type == "epsilon"
        assert scheduler_of(file, prediction_type="v_prediction").config.prediction_type == "v_prediction"
        assert not caplog.records


def test_a_yaml_beside_the_file_decides_and_the_callers_yaml_decides_over_it(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.symlink_to(file)
    (tmp_path / "model.yaml").write_text("model: {params: {unet_config: {}, parameterization: v}}")
    assert scheduler_of(path).config.prediction_type == "v_prediction"
    (tmp_path / "other.yaml").write_text("model: {params: {unet_config: {}}}")
    assert scheduler_of(path, original_config=tmp_path / "other.yaml").config.prediction_type == "epsilon"


def test_a_callers_scheduler_or_configs_settle_it(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = SimpleNamespace(config={"prediction_type": "epsilon"})
    config = {"_class_name": "DDIMScheduler", "prediction_type": "sample"}
    with caplog.at_level(logging.WARNING, "russet"):
        loaded = single_file(file, overrides={**NO_WORDS, "scheduler": mine}, config=ldm_tiny.configs("sd2"))
        assert loaded.components["scheduler"] is mine
        found = scheduler_of(file, config={**ldm_tiny.configs("sd2"), "scheduler": config})
    assert found.config.prediction_type == "sample"
    assert not caplog.records


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_markers_of_velocity_and_zero_terminal_snr_reach_the_scheduler(family: str, tmp_path: Path) -> None:
    tensors = {**ldm_tiny.original(family), "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = scheduler_of(tmp_path / "model.safetensors", family).config
    assert config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr is True
    assert config.timestep_spacing == "trailing"


def test_the_published_scheduler_of_each_kind_is_made(file: Path, tmp_path: Path) -> None:
    sd1 = ldm_tiny.write_original(tmp_path / "sd1.safetensors", "sd1")
    assert type(scheduler_of(sd1, "sd1")).__name__ == "PNDMScheduler"
    assert type(scheduler_of(file, prediction_type="epsilon")).__name__ == "PNDMScheduler"
    assert type(scheduler_of(file, prediction_type="v_prediction")).__name__ == "DDIMScheduler"
    turbo = ldm_tiny.write_original(tmp_path / "sd_turbo.safetensors", "sd2")
    assert scheduler_of(turbo).config.timestep_spacing == "trailing"
    xl = ldm_tiny.write_original(tmp_path / "xl.safetensors", "sdxl")
    assert type(scheduler_of(xl, "sdxl")).__name__ == "EulerDiscreteScheduler"


def noise_predictor() -> UNet2DConditionModel:
    """A UNet whose output is its input, up to a scale: what predicting noise comes to where there is only noise.

    All weights are zero but on one path: the first convolution makes a pair (x, -x) of each channel, the last residual
    block takes it from the skip connection, and SiLU(n) - SiLU(-n) = n undoes the pairs behind the last norm.
    """
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        cross_attention_dim=4,
        norm_num_groups=1,
        attention_head_dim=1,
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
        pairs = torch.cat([torch.eye(4), -torch.eye(4)])
        unet.conv_in.weight[:, :, 1, 1] = pairs
        unet.up_blocks[-1].resnets[-1].conv_shortcut.weight[:, 8:, 0, 0] = torch.eye(8)
        unet.conv_norm_out.weight.fill_(1)
        unet.conv_out.weight[:, :, 1, 1] = pairs.t()
    return unet.eval()


def test_a_trial_tells_a_network_that_predicts_noise_from_one_that_predicts_velocity(shared_mini: Any) -> None:
    assert probe_prediction(noise_predictor()) == "epsilon"
    assert probe_prediction(shared_mini.unet) == "v_prediction"  # trained so; its scheduler's config says the same


def test_a_trial_that_is_neither_says_so() -> None:
    unet = noise_predictor()
    with torch.no_grad():  # each channel becomes the sum of three: a likeness of 1 / sqrt(3)
        unet.conv_out.weight += unet.conv_out.weight.roll(1, 0) + unet.conv_out.weight.roll(2, 0)
    assert probe_prediction(unet) is None


def test_what_the_trial_finds_decides_between_the_kinds_of_stable_diffusion_2(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unet = noise_predictor()
    tensors = {key: value for key, value in ldm_tiny.original("sd2").items() if not key.startswith("model.")}
    save_file({**tensors, **gathered(UNET, unet)}, tmp_path / "model.safetensors")
    config = {**ldm_tiny.configs("sd2"), "unet": dict(unet.config)}
    with caplog.at_level(logging.WARNING, "russet"):
        loaded = single_file(tmp_path / "model.safetensors", overrides=NO_WORDS, config=config)
    assert loaded.components["scheduler"].config.prediction_type == "epsilon"
    assert type(loaded.components["scheduler"]).__name__ == "PNDMScheduler"  # that of the 512-pixel model
    assert "a trial of its UNet shows" in caplog.text
