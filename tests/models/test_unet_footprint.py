"""The walk along a UNet's stages against exact counts of the bytes that its calls keep alive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import russet
from russet.backends.cpu import winograd_heuristics
from russet.checkpoints.load_state_dict import build
from russet.generate.deep_cache import from_deep_map
from russet.hardware.facts import parse_version
from russet.models.attention import HAS_SDPA, chunked, sliced, upcast
from russet.models.footprint import Arithmetic
from russet.models.unet import UNet2DConditionModel
from russet.models.unet_config import UNetConfig
from russet.models.unet_footprint import deep_map, unet_peak
from russet.passes import workarounds
from russet.passes.prompt_cache import cached_prompt
from russet.planning import reference_models
from russet.planning.plan_types import AttentionChoice

from .footprints import ATTENTIONS, NO_MAPS, PLAIN, SETTINGS, applied, arithmetic, peak_of, require_predicted

CROSS, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
NEEDS_STORAGES = pytest.mark.skipif(
    not hasattr(torch.Tensor, "untyped_storage"), reason="torch 1.13 cannot tell which tensors share memory"
)


def unet_config(channels: list[int], kinds: list[str], **more: Any) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        **more,
    }


UNETS: dict[str, dict[str, Any]] = {
    "shaped like SD 1.5": unet_config([32, 64, 128, 128], [CROSS, CROSS, CROSS, DOWN], layers_per_block=2),
    "shaped like XL": unet_config(
        [32, 64, 128], [DOWN, CROSS, CROSS], transformer_layers_per_block=[1, 2, 4], attention_head_dim=[2, 4, 8]
    ),
    "without a middle": unet_config([32, 64], [CROSS, DOWN], layers_per_block=1, mid_block_type=None),
    "two layers deep": unet_config([32, 64], [CROSS, DOWN], layers_per_block=1, transformer_layers_per_block=2),
    "attention to the text alone": unet_config([32, 64], [CROSS, DOWN], layers_per_block=1, only_cross_attention=True),
    "without attention": unet_config([32, 64], [DOWN, DOWN], mid_block_type="UNetMidBlock2D"),
    "scale and shift": unet_config(
        [32, 64], [DOWN, DOWN], mid_block_type="UNetMidBlock2D", resnet_time_scale_shift="scale_shift"
    ),
}
SIZES = {"flat": (18, 32), "tall": (40, 12)}


def counted(unet: Any, values: dict[str, Any], size: tuple[int, int]) -> int:
    """Bytes of a call, its latents among them, which a caller holds."""
    x, text = torch.randn(2, unet.config.in_channels, *size), torch.randn(2, 77, unet.config.text_features or 32)
    applied(unet, "unet", values)
    with torch.no_grad():
        read = cached_prompt(unet, text, values.get("prompt_cache", "off"))
    return peak_of(lambda: unet(x, 1.0, read)) + x.numel() * 4


@NEEDS_STORAGES
@pytest.mark.skipif(not HAS_SDPA, reason="without fused attention the scores are the peak, which hide the maps")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", UNETS)
def test_a_call_peaks_as_predicted(name: str, setting: str, size: str) -> None:
    unet, values = UNet2DConditionModel(UNETS[name]).requires_grad_(False), SETTINGS[setting]
    measured = counted(unet, values, SIZES[size])
    predicted = unet_peak(unet.config, 2, SIZES[size], arithmetic("unet", values))
    require_predicted(predicted, measured, within=0.02)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("setting", ["plain", "donated"])
@pytest.mark.parametrize("name", ["shaped like SD 1.5", "shaped like XL", "without a middle"])
def test_a_call_peaks_as_predicted_however_it_attends(name: str, setting: str, attention: str) -> None:
    unet, (choice, function) = UNet2DConditionModel(UNETS[name]), ATTENTIONS[attention]
    unet.set_attention(function)
    measured = counted(unet, SETTINGS[setting], (18, 32))
    how = arithmetic("unet", SETTINGS[setting], attention=choice)
    require_predicted(unet_peak(unet.config, 2, (18, 32), how), measured)


@NEEDS_STORAGES
@pytest.mark.parametrize("name", UNETS)
def test_passes_never_take_more_than_the_plain_network(name: str) -> None:
    plain = counted(UNet2DConditionModel(UNETS[name]), PLAIN, (18, 32))
    for setting, values in SETTINGS.items():
        if setting in ("folded", "all"):  # scores of all heads, which are more than the features of so narrow a network
            continue
        unet = UNet2DConditionModel(UNETS[name]).requires_grad_(False)
        assert counted(unet, values, (18, 32)) <= (1 + NO_MAPS) * plain, values


@pytest.mark.parametrize("setting", ["plain", "donated"])
def test_half_precision_with_float32_scores_peaks_as_predicted(setting: str) -> None:
    unet = UNet2DConditionModel(UNETS["without a middle"]).to(torch.bfloat16)
    unet.set_attention(upcast(chunked(64)))
    applied(unet, "unet", SETTINGS[setting])
    x, text = torch.randn(2, 4, 16, 16).bfloat16(), torch.randn(2, 77, 32).bfloat16()
    measured = peak_of(lambda: unet(x, 1.0, text))
    choice = AttentionChoice(kind="chunked", queries=64, upcast=True)
    how = arithmetic("unet", SETTINGS[setting], width=2, attention=choice)
    require_predicted(unet_peak(unet.config, 2, (16, 16), how), measured)


@pytest.mark.parametrize("setting", ["plain", "donated"])
def test_composed_norms_peak_as_predicted(setting: str) -> None:
    unet, values = UNet2DConditionModel(UNETS["without a middle"]).to(torch.bfloat16), SETTINGS[setting]
    values = {**values, "group_norm": "composed"}
    applied(unet, "unet", values)
    unet.set_attention(chunked(64))
    x, text = torch.randn(2, 4, 16, 16).bfloat16(), torch.randn(2, 77, 32).bfloat16()
    measured = peak_of(lambda: unet(x, 1.0, text))
    choice, norms = AttentionChoice(kind="chunked", queries=64), workarounds.norm_workspace(values)
    how = arithmetic("unet", SETTINGS[setting], width=2, attention=choice, norm_workspace=norms)
    require_predicted(unet_peak(unet.config, 2, (16, 16), how), measured)


@pytest.mark.skipif(not HAS_SDPA, reason="without fused attention the scores are the peak, which hide the maps")
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
@pytest.mark.parametrize("setting", ["plain", "donated"])
@pytest.mark.parametrize("parts", [False, True])
def test_winograds_convolutions_peak_as_predicted(
    size: tuple[int, int], setting: str, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parts:
        monkeypatch.setattr(winograd_heuristics, "WHOLE", 2**20)
        monkeypatch.setattr(winograd_heuristics, "MAPS_AT_ONCE", 2**19)
    config = unet_config([128, 256], [CROSS, DOWN], layers_per_block=1, norm_num_groups=32)
    values = {**SETTINGS[setting], "winograd": True}
    unet = UNet2DConditionModel(config)
    measured = counted(unet, values, size)
    require_predicted(unet_peak(unet.config, 2, size, arithmetic("unet", values)), measured)


def test_the_embedded_unet_peaks_as_predicted() -> None:
    folder = Path(russet.__file__).parent / "mini" / "unet"
    unet = UNet2DConditionModel.from_config(json.loads((folder / "config.json").read_text()))
    unet.set_attention(chunked(256))
    measured = counted(unet, PLAIN, (32, 32))
    how = Arithmetic(attention=AttentionChoice(kind="chunked", queries=256))
    require_predicted(unet_peak(unet.config, 2, (32, 32), how), measured)


@pytest.mark.skipif(parse_version(torch.__version__) < (2, 0), reason="older torch has no meta kernels for all of it")
@pytest.mark.parametrize("setting", SETTINGS)
def test_stable_diffusion_15_peaks_as_predicted_at_full_size(setting: str) -> None:
    config, values = UNetConfig.from_dict(reference_models.SD15_UNET), dict(SETTINGS[setting])
    if values.get("prompt_cache") == "folded into weights":
        values["prompt_cache"] = "keys and values"  # only what torch's own kernel attends by is folded
    unet: Any = build(UNet2DConditionModel, config).half()
    unet.set_attention(sliced(16))
    applied(unet, "unet", values)
    x, text = (torch.empty(shape, device="meta", dtype=torch.float16) for shape in ((2, 4, 64, 64), (2, 77, 768)))
    with torch.no_grad():
        read = cached_prompt(unet, text, values.get("prompt_cache", "off"))
    measured = peak_of(lambda: unet(x, 1.0, read)) + x.numel() * 2  # shapes alone: nothing is computed
    how = arithmetic("unet", values, width=2, attention=AttentionChoice(kind="sliced", rows=16))
    require_predicted(unet_peak(config, 2, (64, 64), how), measured)


@pytest.mark.parametrize("name", ["shaped like SD 1.5", "shaped like XL", "without a middle"])
def test_a_deep_map_has_the_shape_that_the_config_tells(name: str) -> None:
    unet = UNet2DConditionModel(UNETS[name])
    x, text = torch.zeros(1, 4, 16, 16), torch.zeros(1, 2, 32)
    emb = unet.embed(x, 1.0, None, None, None)
    for branch in range(len(unet.output_stages) - 1):
        _, kept = from_deep_map(unet, x, emb, text, branch, None)
        level, channels = deep_map(unet.config, branch)
        assert kept.shape == (1, channels, 16 >> level, 16 >> level)
