"""Predicted peaks against exact counts of the bytes that real networks keep alive."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from russet.backends.cpu.ops import OnCPU
from russet.models.norms import set_norms

from russet.backends.cpu import winograd_heuristics
from russet.checkpoints.load_state_dict import build
from russet.errors import ConfigError, InputError
from russet.hardware.facts import mac, parse_version
from russet.models.attention import HAS_SDPA, chunked, fused, padded, sliced, upcast
from russet.models.clip_text import CLIPTextModel, CLIPTextModelWithProjection
from russet.models.safety_checker import StableDiffusionSafetyChecker
from russet.models.tiny_vae import AutoencoderTiny
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL
from russet.planning import parameters, prepared, reference_models
from russet.planning.activations import Arithmetic, decoder_peak, encoder_peak, tower_peak, unet_peak
from russet.planning.plan import Request, plan
from russet.planning.plan_types import AttentionChoice
from russet.planning.workload import TransformerSizes, UNetSizes, VAESizes

from .live_bytes import LiveBytes

MINI = Path(__file__).parents[2] / "src" / "russet" / "mini"
CROSS = "CrossAttnDownBlock2D"
WITHIN = 0.1  # what the estimates promise

ATTENTIONS = {
    **({"fused": (AttentionChoice(), fused)} if HAS_SDPA else {}),  # without it no plan chooses it
    "sliced": (AttentionChoice(kind="sliced", rows=2), sliced(2)),
    "chunked": (AttentionChoice(kind="chunked", queries=64), chunked(64)),
    "both ways": (AttentionChoice(kind="chunked", queries=64, keys=128), chunked(64, 128)),
}


def unet_config(channels, kinds, **more):
    return {
        "block_out_channels": channels,
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        **more,
    }


UNETS = {
    "shaped like SD 1.5": unet_config([32, 64, 128, 128], [CROSS, CROSS, CROSS, "DownBlock2D"], layers_per_block=2),
    "shaped like XL": unet_config(
        [32, 64, 128],
        ["DownBlock2D", CROSS, CROSS],
        transformer_layers_per_block=[1, 2, 4],
        attention_head_dim=[2, 4, 8],
    ),
    "without a middle": unet_config([32, 64], [CROSS, "DownBlock2D"], layers_per_block=1, mid_block_type=None),
}


def peak_of(call):
    with torch.no_grad(), LiveBytes() as counted:
        call()
    return counted.peak


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", UNETS)
def test_a_unet_call_peaks_as_predicted(name, attention):
    unet, (choice, function) = UNet2DConditionModel(UNETS[name]), ATTENTIONS[attention]
    unet.set_attention(function)
    x, text = torch.randn(2, 4, 18, 32), torch.randn(2, 77, 32)
    measured = peak_of(lambda: unet(x, 1.0, text))
    assert unet_peak(UNetSizes.of(UNETS[name]), 2, (18, 32), Arithmetic(attention=choice)) == pytest.approx(
        measured, rel=WITHIN
    )


@pytest.mark.skipif(not hasattr(torch.Tensor, "untyped_storage"), reason="torch 1.13 joins no weights")
@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("name", UNETS)
def test_a_unet_call_with_sums_in_products_peaks_as_predicted(name, absorbed):
    unet = UNet2DConditionModel(UNETS[name])
    unet.set_attention(fused)
    unet.lay_together()
    unet.lay_sums(2)
    x, text = torch.randn(2, 4, 18, 32), unet.read(torch.randn(2, 77, 32), absorbed=absorbed)
    measured = peak_of(lambda: unet(x, 1.0, text))
    how = Arithmetic(summed=True, absorbed=absorbed)
    assert unet_peak(UNetSizes.of(UNETS[name]), 2, (18, 32), how) == pytest.approx(measured, rel=WITHIN)


@pytest.mark.skipif(not hasattr(torch.Tensor, "untyped_storage"), reason="torch 1.13 joins no weights")
@pytest.mark.parametrize("name", UNETS)
def test_what_is_made_before_the_first_step_takes_what_is_predicted(name):
    unet, u = UNet2DConditionModel(UNETS[name]).requires_grad_(False), UNetSizes.of(UNETS[name])
    unet.set_attention(padded(fused, (6, 48)))
    unet.lay_together()
    sizes = dataclasses.replace(reference_models.sd15(images=1), unet=u)
    found = plan(mac("M1", memory_gib=64), sizes, Request(dtype="float32"))
    choice = AttentionChoice(pad=(6, 48))
    unet.lay_sums(0)  # nothing repeated, but all weights laid with what they need beside them
    unet.drop_sums()
    with LiveBytes() as counted:
        unet.lay_sums(2)
        live = counted.live
        text = unet.read(torch.randn(2, 77, 32), absorbed=True)
        absorbed = counted.live - live
        times = unet.tell([500.0] * prepared.PRECOMPUTED)
        told = counted.live - live - absorbed
    assert live == pytest.approx(prepared.weight_copy_bytes(sizes, found, 2, choice), rel=WITHIN)
    assert absorbed == pytest.approx(prepared.folded_bytes(sizes, found), rel=WITHIN)
    assert told == pytest.approx(prepared.timestep_embedding_bytes(sizes, found), rel=WITHIN)
    del text, times


def test_half_precision_with_float32_scores_peaks_as_predicted():
    config = UNETS["without a middle"]
    unet = UNet2DConditionModel(config).to(torch.bfloat16)
    unet.set_attention(upcast(chunked(64)))
    x, text = torch.randn(2, 4, 16, 16).bfloat16(), torch.randn(2, 77, 32).bfloat16()
    measured = peak_of(lambda: unet(x, 1.0, text))
    choice = AttentionChoice(kind="chunked", queries=64, upcast=True)
    assert unet_peak(UNetSizes.of(config), 2, (16, 16), Arithmetic(width=2, attention=choice)) == pytest.approx(
        measured, rel=WITHIN
    )


def test_composed_norms_peak_as_predicted():
    config = UNETS["without a middle"]
    unet = UNet2DConditionModel(config).to(torch.bfloat16)
    set_norms(unet.modules(), composed_groups=True, float32_layers=False)
    unet.set_attention(chunked(64))
    x, text = torch.randn(2, 4, 16, 16).bfloat16(), torch.randn(2, 77, 32).bfloat16()
    measured = peak_of(lambda: unet(x, 1.0, text))
    how = Arithmetic(width=2, attention=AttentionChoice(kind="chunked", queries=64), composed=True)
    assert unet_peak(UNetSizes.of(config), 2, (16, 16), how) == pytest.approx(measured, rel=WITHIN)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("channels", [[16, 32, 64, 64], [32, 64], [32, 128, 256]])
def test_the_vae_peaks_as_predicted_both_ways(channels, attention):
    levels = len(channels)
    config = {
        "block_out_channels": channels,
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    vae, sizes, (choice, function) = AutoencoderKL(config), VAESizes.of(config), ATTENTIONS[attention]
    vae.set_attention(function)
    z, x = torch.randn(2, 4, 16, 12), torch.randn(2, 3, 16 * sizes.factor, 12 * sizes.factor)
    decoding, encoding = peak_of(lambda: vae.decode(z)), peak_of(lambda: vae.encode(x))
    assert decoder_peak(sizes, 2, (16, 12), Arithmetic(attention=choice)) == pytest.approx(decoding, rel=WITHIN)
    pixels = x.numel() * 4  # made outside, and counted in the prediction
    assert encoder_peak(sizes, 2, (16, 12), Arithmetic(attention=choice)) - pixels == pytest.approx(
        encoding, rel=WITHIN
    )


def test_a_tiny_vae_peaks_as_predicted_both_ways():
    config = {"encoder_block_out_channels": [16] * 4, "decoder_block_out_channels": [16] * 4}
    vae, sizes = AutoencoderTiny(config), VAESizes.of(config)
    z, x = torch.randn(2, 4, 16, 12), torch.randn(2, 3, 128, 96)
    decoding, encoding = peak_of(lambda: vae.decode(z)), peak_of(lambda: vae.encode(x))
    assert decoder_peak(sizes, 2, (16, 12), Arithmetic()) == pytest.approx(decoding, rel=WITHIN)
    assert encoder_peak(sizes, 2, (16, 12), Arithmetic()) == pytest.approx(encoding, rel=WITHIN)


def test_a_vae_with_composed_norms_peaks_as_predicted():
    config = {"block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8}
    config |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae, sizes = AutoencoderKL(config).to(torch.bfloat16), VAESizes.of(config)
    set_norms(vae.modules(), composed_groups=True, float32_layers=False)
    z = torch.randn(1, 4, 12, 12).bfloat16()
    measured = peak_of(lambda: vae.decode(z))
    how = Arithmetic(width=2, composed=True)
    assert decoder_peak(sizes, 1, (12, 12), how) == pytest.approx(measured, rel=WITHIN)


@pytest.mark.skipif(not HAS_SDPA, reason="without fused attention the scores are the peak, which hide the maps")
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
@pytest.mark.parametrize("parts", [False, True])
def test_networks_on_a_cpu_peak_as_predicted(size, parts, monkeypatch):
    if parts:
        monkeypatch.setattr(winograd_heuristics, "WHOLE", 2**20)
        monkeypatch.setattr(winograd_heuristics, "MAPS_AT_ONCE", 2**19)
    config = {
        "block_out_channels": [128, 256],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    }
    unet = UNet2DConditionModel.from_config(config)
    unet.set_elementwise(OnCPU(by_onednn=False))
    x, text = torch.randn(2, 4, *size), torch.randn(2, 77, 32)
    how = Arithmetic(winograd=True)
    measured = peak_of(lambda: unet(x, 1.0, text))
    assert unet_peak(UNetSizes.of(config), 2, size, how) == pytest.approx(measured, rel=WITHIN)
    config = {
        "block_out_channels": [128, 256],
        "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    vae = AutoencoderKL.from_config(config)
    vae.set_elementwise(OnCPU(by_onednn=False))
    z = torch.randn(1, 4, *size)
    measured = peak_of(lambda: vae.decode(z))
    assert decoder_peak(VAESizes.of(config), 1, size, how) == pytest.approx(measured, rel=WITHIN)


@pytest.mark.parametrize("attention", sorted({"fused", "chunked"} & ATTENTIONS.keys()))
def test_a_text_encoder_peaks_as_predicted(attention):
    config = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 100}
    text, (choice, function) = CLIPTextModel(config), ATTENTIONS[attention]
    text.set_attention(function)
    measured = peak_of(lambda: text(torch.ones(2, 77, dtype=torch.long)))
    sizes = TransformerSizes.text({**config, "num_attention_heads": text.config.num_attention_heads})
    assert tower_peak(sizes, 2, Arithmetic(attention=choice)) == pytest.approx(measured, rel=WITHIN)


def test_the_embedded_unet_peaks_as_predicted():
    config = json.loads((MINI / "unet" / "config.json").read_text())
    unet, sizes = UNet2DConditionModel.from_config(config), UNetSizes.of(config)
    unet.set_attention(chunked(256))
    x, text = torch.randn(2, 4, 32, 32), torch.randn(2, 77, sizes.context[0])
    measured = peak_of(lambda: unet(x, 1.0, text))
    how = Arithmetic(attention=AttentionChoice(kind="chunked", queries=256))
    assert unet_peak(sizes, 2, (32, 32), how) == pytest.approx(measured, rel=WITHIN)


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


def test_a_deep_map_has_the_shape_that_the_sizes_tell():
    for config in UNETS.values():
        unet, sizes = UNet2DConditionModel(config), UNetSizes.of(config)
        for branch in range(unet.deep_branches):
            _, kept = unet(torch.zeros(1, 4, 16, 16), 1.0, torch.zeros(1, 2, 32), deep_branch=branch)
            level, channels = sizes.deep_map(branch)
            assert kept.shape == (1, channels, 16 >> level, 16 >> level)


@pytest.mark.skipif(parse_version(torch.__version__) < (2, 0), reason="older torch has no meta kernels for all of it")
def test_stable_diffusion_15_peaks_as_predicted_at_full_size():
    unet = build(UNet2DConditionModel, UNet2DConditionModel.config_class.from_dict(reference_models.SD15_UNET)).half()
    unet.set_attention(sliced(16))
    x, text = (torch.empty(shape, device="meta", dtype=torch.float16) for shape in ((2, 4, 64, 64), (2, 77, 768)))
    measured = peak_of(lambda: unet(x, 1.0, text))  # shapes alone: nothing is computed
    how = Arithmetic(width=2, attention=AttentionChoice(kind="sliced", rows=16))
    assert unet_peak(UNetSizes.of(reference_models.SD15_UNET), 2, (64, 64), how) == pytest.approx(measured, rel=WITHIN)


def test_parameters_are_counted_exactly():
    for config in UNETS.values():
        assert parameters.unet(UNetSizes.of(config)) == count(UNet2DConditionModel(config))
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    assert parameters.transformer(TransformerSizes.text(text)) == count(CLIPTextModel(text))
    projected = {**text, "projection_dim": 24}
    assert parameters.transformer(TransformerSizes.text(projected, projected=True)) == count(
        CLIPTextModelWithProjection(projected)
    )
    checker = {
        "projection_dim": 24,
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    }
    checker["vision_config"] |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    assert parameters.safety_checker(TransformerSizes.vision(checker)) == count(StableDiffusionSafetyChecker(checker))


def test_the_published_checkpoints_have_their_published_numbers_of_parameters():
    # as the safetensors headers on the Hub add up, buffers left out
    assert parameters.counts(reference_models.sd15()) == {
        "text_encoder": 123_060_480,
        "unet": 859_520_964,
        "vae": 83_653_863,
        "safety_checker": 303_981_588,
    }
    xl = parameters.counts(reference_models.sdxl())
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
    assert parameters.unet(UNetSizes.of(config)) == count(UNet2DConditionModel(config))


def test_lists_that_do_not_agree_are_a_config_error():
    with pytest.raises(ConfigError, match="2 levels"):
        UNetSizes.of(unet_config([32, 64], [CROSS, "DownBlock2D"], layers_per_block=[2]))


@pytest.mark.parametrize("width", [0, -64, 512.0, True, "512"])
def test_a_size_that_is_no_positive_whole_number_is_refused(width):
    with pytest.raises(InputError, match="width"):
        reference_models.sd15(width=width)


def test_the_size_defaults_to_what_the_model_was_trained_at():
    assert (reference_models.sd15().width, reference_models.sdxl().width) == (512, 1024)


def test_only_the_xl_family_needs_its_autoencoder_in_float32():
    assert reference_models.sdxl().vae.float32
    assert not reference_models.sd15().vae.float32


def count(module):
    return sum(p.numel() for p in module.parameters())
