from __future__ import annotations

import pytest
import torch
from torch import nn

from russet import passes
from russet.backends.layers import ComposedGroupNorm, Float32LayerNorm, PairedLinear
from russet.models.unet import UNet2DConditionModel
from russet.passes.base import Choices

TINY = {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}


@pytest.fixture(params=["in few operations", "in little memory"])
def way(request, monkeypatch):
    """Both ways of the composed norm, whatever the size."""
    monkeypatch.setattr("russet.backends.norm_heuristics.AT_ONCE", 0 if request.param == "in little memory" else 2**40)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_composed_group_norm_equals_torchs(memory_format):
    x = (3 * torch.randn(2, 24, 5, 7) + 10).contiguous(memory_format=memory_format)
    norm = nn.GroupNorm(8, 24)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = norm(x)
    norm.__class__ = ComposedGroupNorm
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.cpu_half
@pytest.mark.usefixtures("way")
def test_a_composed_group_norm_survives_what_overflows_when_squared_in_half_precision():
    x = 1000 * torch.randn(1, 16, 8, 8)
    norm = ComposedGroupNorm(4, 16)
    half = norm.half()(x.half()).float()
    assert torch.isfinite(half).all()
    torch.testing.assert_close(half, norm.float()(x), rtol=5e-3, atol=5e-3)


@pytest.mark.cpu_half
@pytest.mark.usefixtures("way")
def test_a_composed_group_norm_is_exact_far_from_zero_in_half_precision():
    x = (30 + torch.randn(2, 32, 16, 16)).half()
    norm = ComposedGroupNorm(8, 32)
    expected = nn.GroupNorm(8, 32)(x.float())
    assert (norm.half()(x).float() - expected).abs().max() <= 0.02  # rounding the mean to half precision alone is 0.016


def test_a_float32_layer_norm_takes_and_gives_half_precision():
    x = torch.randn(3, 5, 32)
    norm = nn.LayerNorm(32)
    nn.init.normal_(norm.weight)
    expected = norm(x)
    norm.half().__class__ = Float32LayerNorm
    out = norm(x.half())
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), expected, rtol=3e-3, atol=3e-3)


def test_a_paired_linear_layer_gives_the_same_for_one_vector_and_for_many():
    layer = nn.Linear(6, 4)
    for shape in ((1, 6), (3, 6), (1, 1, 6)):
        x = torch.randn(shape)
        expected = layer(x)
        layer.__class__ = PairedLinear
        torch.testing.assert_close(layer(x), expected)
        layer.__class__ = nn.Linear


def test_workarounds_change_neither_parameters_nor_results_and_can_be_undone():
    unet = UNet2DConditionModel(TINY)
    unet.conv_norm_out.register_forward_hook(lambda *_: None)  # a layer that somebody watches is computed right too
    names = list(unet.state_dict())
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 16)
    with torch.no_grad():
        expected = unet(x, 1.0, text).sample
        changes = passes.apply(
            unet, "unet", Choices({**passes.OFF, "group_norm": "composed", "layer_norm": "float32"}, rows=2)
        )
        kinds = {type(module) for module in unet.modules()}
        assert {ComposedGroupNorm, Float32LayerNorm} <= kinds
        assert not {nn.GroupNorm, nn.LayerNorm} & kinds
        torch.testing.assert_close(unet(x, 1.0, text).sample, expected, rtol=1e-4, atol=1e-5)
        assert list(unet.state_dict()) == names
        changes.undo()
    assert {nn.GroupNorm, nn.LayerNorm} <= {type(module) for module in unet.modules()}
    assert not {ComposedGroupNorm, Float32LayerNorm} & {type(module) for module in unet.modules()}
