from __future__ import annotations

import logging

import pytest
import torch

from russet.checkpoints.layouts.old_checkpoints import renamed, repaired, repairs_apply
from russet.models.unet_config import UNetConfig
from russet.schedulers.named import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler


class Kept:
    """A tensor that knows where it came from."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.torch_dtype = torch.float32

    def read(self, *, brief: bool = False) -> torch.Tensor:
        return torch.arange(float(torch.Size(self.shape).numel())).reshape(self.shape)


VAE = "decoder.mid_block.attentions.0."


def test_old_attention_names_of_the_vae_become_todays() -> None:
    wanted = {f"{VAE}{name}": (4, 4) for name in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")}
    old = {f"{VAE}{name}.weight": Kept(4, 4) for name in ("query", "key", "value", "proj_attn")}
    assert renamed(old, wanted) == dict(zip(wanted, old.values(), strict=True))


def test_todays_attention_names_stay() -> None:
    given = {f"{VAE}to_q.weight": Kept(4, 4)}
    assert renamed(given, {f"{VAE}to_q.weight": (4, 4)}) == given


def test_attention_stored_as_convolutions_becomes_matrices() -> None:
    result = renamed({f"{VAE}query.weight": Kept(4, 4, 1, 1)}, {f"{VAE}to_q.weight": (4, 4)})
    squeezed = result[f"{VAE}to_q.weight"]
    assert squeezed.shape == (4, 4)
    assert torch.equal(squeezed.read(), torch.arange(16.0).reshape(4, 4))


def test_a_real_convolution_of_one_by_one_stays_one() -> None:
    conv = Kept(4, 4, 1, 1)
    assert renamed({"quant_conv.weight": conv}, {"quant_conv.weight": (4, 4, 1, 1)}) == {"quant_conv.weight": conv}


def test_position_ids_are_dropped_wherever_they_are() -> None:
    places = ("", "embeddings.", "text_model.embeddings.", "text_model.encoder.text_model.embeddings.")
    assert renamed({f"{place}position_ids": Kept(1, 77) for place in places}, {}) == {}


def test_the_prefix_of_a_text_encoder_is_added_or_taken_away() -> None:
    with_it, without = "text_model.final_layer_norm.weight", "final_layer_norm.weight"
    for wanted in (with_it, without):
        for given in (with_it, without):
            assert list(renamed({given: Kept(3)}, {wanted: (3,)})) == [wanted]


def test_the_second_prefix_of_the_safety_checker_is_added_or_taken_away() -> None:
    once, twice = "vision_model.post_layernorm.bias", "vision_model.vision_model.post_layernorm.bias"
    for wanted in (once, twice):
        for given in (once, twice):
            assert list(renamed({given: Kept(3)}, {wanted: (3,)})) == [wanted]


def test_a_name_that_no_rule_helps_is_left_to_be_reported() -> None:
    assert list(renamed({"lora.up": Kept(1)}, {"x": (1,)})) == ["lora.up"]


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
