"""The walks through a VAE's halves against exact counts of the bytes that they keep alive."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from russet.backends.cpu import winograd_heuristics
from russet.models.attention import HAS_SDPA
from russet.models.footprint import Arithmetic
from russet.models.tiny_vae import AutoencoderTiny
from russet.models.vae import AutoencoderKL
from russet.models.vae_footprint import decoder_peak, encoder_peak
from russet.passes import workarounds

from .footprints import ATTENTIONS, SETTINGS, applied, arithmetic, peak_of, require_predicted

WITHIN = 0.02


def vae_config(channels: list[int], **more: Any) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        **more,
    }


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("setting", ["plain", "donated"])
@pytest.mark.parametrize("size", [(16, 12), (10, 20)])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("channels", [[16, 32, 64, 64], [32, 64], [32, 128, 256]])
def test_a_vae_peaks_as_predicted_both_ways(
    channels: list[int], layers: int, size: tuple[int, int], setting: str, attention: str
) -> None:
    vae, (choice, function) = AutoencoderKL(vae_config(channels, layers_per_block=layers)), ATTENTIONS[attention]
    vae.set_attention(function)
    applied(vae, "vae", SETTINGS[setting])
    unit, how = vae.config.pixels_per_latent, arithmetic("vae", SETTINGS[setting], attention=choice)
    z, x = torch.randn(2, 4, *size), torch.randn(2, 3, size[0] * unit, size[1] * unit)
    decoding, encoding = peak_of(lambda: vae.decode(z)), peak_of(lambda: vae.encode(x))
    # What is made outside is counted in the prediction of an encoder.
    require_predicted(decoder_peak(vae.config, 2, size, how), decoding, WITHIN)
    require_predicted(encoder_peak(vae.config, 2, size, how), encoding + x.numel() * 4, WITHIN)


@pytest.mark.parametrize("channels", [[16, 32, 64, 64], [32, 64]])
def test_in_place_it_never_takes_more(channels: list[int]) -> None:
    vae = AutoencoderKL(vae_config(channels))
    z, x = torch.randn(1, 4, 16, 12), torch.randn(1, 3, 64, 64)
    plain = peak_of(lambda: vae.decode(z)), peak_of(lambda: vae.encode(x))
    applied(vae, "vae", SETTINGS["donated"])
    donated = peak_of(lambda: vae.decode(z)), peak_of(lambda: vae.encode(x))
    assert donated[0] <= plain[0]
    assert donated[1] <= plain[1]
    assert donated != plain or not HAS_SDPA  # else the scores of attention take the most, in any case


def test_a_tiny_vae_peaks_as_predicted_both_ways() -> None:
    vae = AutoencoderTiny({"encoder_block_out_channels": [16] * 4, "decoder_block_out_channels": [16] * 4})
    z, x = torch.randn(2, 4, 16, 12), torch.randn(2, 3, 128, 96)
    decoding, encoding = peak_of(lambda: vae.decode(z)), peak_of(lambda: vae.encode(x))
    require_predicted(decoder_peak(vae.config, 2, (16, 12), Arithmetic()), decoding)
    require_predicted(encoder_peak(vae.config, 2, (16, 12), Arithmetic()), encoding + x.numel() * 4)


@pytest.mark.parametrize("setting", ["plain", "donated"])
def test_composed_norms_peak_as_predicted(setting: str) -> None:
    vae, values = AutoencoderKL(vae_config([32, 64], layers_per_block=1)).to(torch.bfloat16), SETTINGS[setting]
    values = {**values, "group_norm": "composed"}
    applied(vae, "vae", values)
    z = torch.randn(1, 4, 12, 12).bfloat16()
    how = arithmetic("vae", SETTINGS[setting], width=2, norm_workspace=workarounds.norm_workspace(values))
    require_predicted(decoder_peak(vae.config, 1, (12, 12), how), peak_of(lambda: vae.decode(z)))


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
    vae, values = AutoencoderKL(vae_config([128, 256], layers_per_block=1)), {**SETTINGS[setting], "winograd": True}
    applied(vae, "vae", values)
    z = torch.randn(1, 4, *size)
    predicted = decoder_peak(vae.config, 1, size, arithmetic("vae", values))
    require_predicted(predicted, peak_of(lambda: vae.decode(z)))
