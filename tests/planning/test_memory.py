"""Predicted peaks of whole calls against exact counts of the bytes that they keep alive."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from russet import passes
from russet.errors import ConfigError, InputError
from russet.hardware.facts import mac
from russet.models.attention import HAS_SDPA, fused, padded
from russet.models.clip_text import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from russet.models.safety_checker import SafetyCheckerConfig, StableDiffusionSafetyChecker
from russet.models.unet import UNet2DConditionModel
from russet.models.unet_config import UNetConfig
from russet.passes import prompt_cache, residual_fusion, timestep_embeddings
from russet.passes.base import Choices, Situation
from russet.planning import parameter_counts, reference_models
from russet.planning.plan import Request, plan
from russet.planning.plan_types import AttentionChoice

from ..families import replanned
from ..models.test_unet_footprint import CROSS, UNETS, unet_config
from .live_bytes import LiveBytes

WITHIN = 0.1  # what the estimates promise


@pytest.mark.skipif(not hasattr(torch.Tensor, "untyped_storage"), reason="torch 1.13 packs no weights")
@pytest.mark.parametrize("name", ["shaped like SD 1.5", "shaped like XL", "without a middle"])
def test_what_is_made_before_the_first_step_takes_what_is_predicted(name):
    unet, u = UNet2DConditionModel(UNETS[name]).requires_grad_(False), UNetConfig.from_dict(UNETS[name])
    unet.set_attention(padded(fused, (6, 48)))
    facts, request = mac("M1", memory_gib=64), Request(dtype="float32")
    sizes = dataclasses.replace(reference_models.sd15(images=1), unet=u)
    values = {"residual_fusion": "with weight copies", "prompt_cache": "folded into weights"}
    values |= {"packed_projections": True, "timestep_embeddings": "precomputed", "buffer_donation": True}
    values |= {"attention.unet": AttentionChoice(pad=(6, 48))}
    situation = Situation(facts, sizes, request, replanned(plan(facts, sizes, request), **values))
    choices = Choices({**passes.OFF, "offload": None, **values}, 2)
    passes.apply(unet, "unet", Choices({**choices.decided, "residual_fusion": "on"}, 2)).undo()  # weights are packed
    with torch.no_grad(), LiveBytes() as counted:
        applied = passes.apply(unet, "unet", choices)
        copied = counted.live
        text = prompt_cache.cached_prompt(unet, torch.randn(2, 77, 32), "folded into weights")
        folded = counted.live - copied
        times = timestep_embeddings.TimestepCache(unet, [float(t) for t in range(timestep_embeddings.AT_ONCE)])
        times(0.0)
        precomputed = counted.live - copied - folded
    assert copied == pytest.approx(residual_fusion.footprint(situation).kept, rel=WITHIN)
    assert folded == pytest.approx(prompt_cache.footprint(situation).kept, rel=WITHIN)
    assert precomputed == pytest.approx(timestep_embeddings.footprint(situation).kept, rel=WITHIN)
    del text, applied


@pytest.mark.parametrize(("width", "height", "images"), [(128, 128, 1), (128, 64, 6)])
def test_a_whole_call_peaks_as_predicted(shared_mini, width, height, images):
    options = {"width": width, "height": height, "num_images_per_prompt": images, "num_inference_steps": 2}
    with LiveBytes() as counted:  # the weights were made before
        output = shared_mini("a cat", seed=0, **options)
    predicted = max(phase.activations + phase.kept for phase in output.plan.estimate.phases)
    assert predicted == pytest.approx(counted.peak, rel=WITHIN)


@pytest.mark.skipif(not HAS_SDPA, reason="without fused attention the scores are the peak, which hide the map")
@pytest.mark.parametrize("branch", [0, 1])
def test_deep_maps_that_are_kept_count_as_predicted(mini, branch):
    options = {"width": 128, "height": 128, "num_images_per_prompt": 12, "num_inference_steps": 2}
    mini._choose(micro_batch=1)
    peaks, predictions = [], []
    for switch in (mini.disable_deep_cache, lambda: mini.enable_deep_cache(2, branch, start=0)):
        switch()
        with LiveBytes() as counted:
            output = mini("a cat", seed=0, output_type="latent", **options)
        peaks.append(counted.peak)
        predictions.append(output.plan.estimate["denoise"].activations + output.plan.estimate["denoise"].kept)
    more = predictions[1] - predictions[0]
    assert more > 0.05 * peaks[0]
    assert peaks[1] - peaks[0] == pytest.approx(more, rel=0.15)  # the map at work is no addition to its call's peak


def test_parameters_are_counted_exactly():
    for config in UNETS.values():
        assert parameter_counts.unet(UNetConfig.from_dict(config)) == count(UNet2DConditionModel(config))
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    assert parameter_counts.text_encoder(CLIPTextConfig.from_dict(text)) == count(CLIPTextModel(text))
    projected = {**text, "projection_dim": 24}
    assert parameter_counts.text_encoder(CLIPTextConfig.from_dict(projected), projected=True) == count(
        CLIPTextModelWithProjection(projected)
    )
    checker = {
        "projection_dim": 24,
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    }
    checker["vision_config"] |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    assert parameter_counts.safety_checker(SafetyCheckerConfig.from_dict(checker)) == count(
        StableDiffusionSafetyChecker(checker)
    )


def test_the_published_checkpoints_have_their_published_numbers_of_parameters():
    # as the safetensors headers on the Hub add up, buffers left out
    assert reference_models.sd15().parameters == {
        "text_encoder": 123_060_480,
        "unet": 859_520_964,
        "vae": 83_653_863,
        "safety_checker": 303_981_588,
    }
    xl = reference_models.sdxl().parameters
    assert (xl["text_encoder"], xl["unet"]) == (123_060_480 + 694_659_840, 2_567_463_684)


def test_nested_transformer_layers_are_counted_for_each_block():
    # as distilled XL models give them
    config = unet_config(
        [32, 64, 128],
        ["DownBlock2D", CROSS, CROSS],
        layers_per_block=2,
        transformer_layers_per_block=[1, [1, 1], [4, 3]],
        reverse_transformer_layers_per_block=[[4, 3, 2], [2, 1, 1], 1],
    )
    assert parameter_counts.unet(UNetConfig.from_dict(config)) == count(UNet2DConditionModel(config))


def test_lists_that_do_not_agree_are_a_config_error():
    with pytest.raises(ConfigError, match="must have 2 entries"):
        UNetConfig.from_dict(unet_config([32, 64], [CROSS, "DownBlock2D"], layers_per_block=[2]))


@pytest.mark.parametrize("width", [0, -64, 512.0, True, "512"])
def test_a_size_that_is_no_positive_whole_number_is_refused(width):
    with pytest.raises(InputError, match="width"):
        reference_models.sd15(width=width)


def test_the_size_defaults_to_what_the_model_was_trained_at():
    assert (reference_models.sd15().width, reference_models.sdxl().width) == (512, 1024)


def test_only_the_xl_family_needs_its_autoencoder_in_float32():
    assert reference_models.sdxl().vae_overflows
    assert not reference_models.sd15().vae_overflows


def count(module):
    return sum(p.numel() for p in module.parameters())
