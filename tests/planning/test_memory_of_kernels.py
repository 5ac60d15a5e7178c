"""Predicted peaks where the kernels for GPUs work, which run in Triton's interpreter here: exact counts of bytes."""

from __future__ import annotations

import pytest
import torch

from russet.backends import norm_heuristics, upsample_heuristics
from russet.models.footprint import Arithmetic
from russet.models.unet import UNet2DConditionModel
from russet.models.unet_footprint import unet_peak
from russet.models.vae import AutoencoderKL
from russet.models.vae_footprint import decoder_peak
from russet.passes import upsample_fusion

from ..models.footprints import applied
from .live_bytes import LiveBytes

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled for the GPU, where bytes are not counted", allow_module_level=True)

from russet.backends.triton import ops, warmup

WITHIN = 0.005


def peak_of(call):
    with torch.no_grad(), LiveBytes() as counted:
        call()
    return counted.peak


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=[False, True], ids=["repeated", "transposed"])
def kernels(request, monkeypatch):
    """The steps, and how they compute."""
    monkeypatch.setattr(ops, "computes", lambda x: True)
    monkeypatch.setattr(upsample_heuristics, "WORTH", 1)
    monkeypatch.setattr(warmup, "ready", lambda: True)
    values = {"ops": "triton", "upsample_fusion": request.param}
    fields = {"donates": True, "in_place_norms": True, "channel_sums": norm_heuristics.sums}
    workspace = upsample_fusion.workspace if request.param else None
    return values, Arithmetic(**fields, upsample_workspace=workspace)


def test_a_decoder_peaks_as_predicted(kernels):
    config = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    config |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    values, how = kernels
    vae, z = AutoencoderKL(config).to(memory_format=torch.channels_last), last(torch.randn(1, 4, 12, 16))
    in_place = applied(vae, "vae", {"buffer_donation": True})
    eager = peak_of(lambda: vae.decode(z))
    in_place.undo()
    applied(vae, "vae", values)
    found = peak_of(lambda: vae.decode(z))
    assert decoder_peak(vae.config, 1, (12, 16), how) == pytest.approx(found, rel=WITHIN)
    one = 8 * 24 * 32 * 4  # of the largest maps, and an eighth of it are the latents
    assert eager == 5.125 * one  # the last level's first block: its input is two, and so is its norm
    assert found == pytest.approx(
        (4.125 if how.upsample_workspace else 4.625) * one, rel=WITHIN
    )  # the doubled map is two


@pytest.mark.parametrize("middle", ["UNetMidBlock2D", None])
def test_a_unet_call_peaks_as_predicted(middle, kernels):
    config = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "mid_block_type": middle}
    config |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    values, how = kernels
    unet, x, text = UNet2DConditionModel(config), last(torch.randn(1, 4, 32, 48)), torch.randn(1, 7, 1280)
    unet.to(memory_format=torch.channels_last)
    in_place = applied(unet, "unet", {"buffer_donation": True})
    eager = peak_of(lambda: unet(x, 1.0, text))
    in_place.undo()
    applied(unet, "unet", values)
    found = peak_of(lambda: unet(x, 1.0, text))
    latents = x.numel() * 4  # made outside, and counted in the prediction
    assert unet_peak(unet.config, 1, (32, 48), how) - latents == pytest.approx(found, rel=WITHIN)
    sums = norm_heuristics.sums(1, 24, 32 * 48)  # joined maps come with them, and are normed in their place
    assert eager - found == pytest.approx(8 * 32 * 48 * 4 - sums, rel=0.01)
