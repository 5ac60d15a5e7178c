from __future__ import annotations

import logging

import pytest

from russet.checkpoints.layouts.old_configs import repaired, repairs_apply
from russet.models.unet_config import UNetConfig
from russet.schedulers.named import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler


def test_old_schedulers_get_the_values_that_were_meant() -> None:
    ddim = repaired(DDIMScheduler.config_class.from_dict({"steps_offset": 0, "clip_sample": True}), "x")
    assert (ddim.steps_offset, ddim.clip_sample) == (1, False)
    assert repaired(PNDMScheduler.config_class.from_dict({}), "x").steps_offset == 1


def test_values_that_are_right_stay_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    config = DDIMScheduler.config_class.from_dict(
        {"steps_offset": 1, "clip_sample": False, "_diffusers_version": "0.42"}
    )
    with caplog.at_level(logging.INFO):
        assert repaired(config, "x") == config
        assert repaired(config, "x").extra == config.extra
    assert not caplog.records


def test_a_repair_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        repaired(DDIMScheduler.config_class.from_dict({"clip_sample": True, "steps_offset": 1}), "scheduler.json")
    assert "scheduler.json: clip_sample is True in this old config; using False" in caplog.text


def test_keys_that_a_scheduler_does_not_have_are_left_alone() -> None:
    config = EulerDiscreteScheduler.config_class.from_dict({"clip_sample": True})
    assert repaired(config, "x").extra["clip_sample"] is True


@pytest.mark.parametrize(
    ("version", "size", "repaired_size"),
    [
        ("0.6.0", 32, 64),
        ("0.8.0.dev0", 32, 64),
        ("0.6.0", 96, 96),
        ("0.9.0", 32, 32),
        ("0.42.1", 32, 32),
        (None, 32, 32),
        (3, 32, 32),
        ("nonsense", 32, 32),
    ],
)
def test_a_unet_of_an_old_version_gets_its_sample_size(version: object, size: int, repaired_size: int) -> None:
    config = UNetConfig.from_dict({"sample_size": size, "_diffusers_version": version})
    assert repaired(config, "x").sample_size == repaired_size


@pytest.mark.parametrize(
    ("pipeline", "expected"),
    [
        ("StableDiffusionPipeline", True),
        ("StableDiffusionImg2ImgPipeline", True),
        ("StableDiffusionXLPipeline", False),
        ("Other", False),
    ],
)
def test_only_stable_diffusion_1_and_2_are_repaired(pipeline: str, expected: bool) -> None:
    assert repairs_apply(pipeline) is expected
