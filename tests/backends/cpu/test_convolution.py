"""The CPU's convolutions and linear layers against PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from russet import passes
from russet.backends.cpu import onednn
from russet.backends.cpu.convolution import CpuConv2d, WinogradUpsample
from russet.backends.cpu.linear import OneDNNLinear, OneDNNTokenProjection
from russet.hardware.facts import read_facts
from russet.models.resnet import Upsample2D
from russet.models.transformer import TokenProjection
from russet.models.unet import UNet2DConditionModel
from russet.passes.base import Choices

HAS_ONEDNN = read_facts("cpu").onednn
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN operation")
WAYS = [
    pytest.param({"winograd": True}, id="winograd"),
    pytest.param({"winograd": True, "onednn_linear": True}, id="both", marks=needs_onednn),
]


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else numbers


def on_cpu(network: nn.Module, **values: bool) -> nn.Module:
    """A copy of layers as the passes for a CPU change them."""
    changed = copy.deepcopy(network)
    passes.apply(changed, "unet", Choices({**passes.OFF, **values}, rows=2))
    return changed


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [3, 1])
def test_convolutions_are_those_of_pytorch(way, bias, size):
    x, conv = made(2, 128, 32, 32), nn.Conv2d(128, 96, size, padding=size // 2, bias=bias)
    changed = on_cpu(nn.Sequential(conv), **way)[0]
    assert type(changed) is CpuConv2d
    assert size == 1 or changed.filters(x, 32, 32)
    found = changed(x)
    torch.testing.assert_close(found, conv(x), rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_of_few_positions_are_those_of_pytorch(bias):
    x, conv = made(2, 128, 7, 5), nn.Conv2d(128, 160, 3, padding=1, bias=bias).to(memory_format=torch.channels_last)
    changed = on_cpu(nn.Sequential(conv), onednn_linear=True)[0]
    assert changed._few(x)
    assert not changed._few(made(2, 128, 16, 16))
    assert not on_cpu(nn.Sequential(nn.Conv2d(128, 4, 3, padding=1)), onednn_linear=True)[0]._few(x)
    found = changed(x)
    torch.testing.assert_close(found, conv(x), rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_upsampled_maps_are_those_of_pytorch():
    x, layer = made(1, 128, 16, 24), Upsample2D(128)
    changed = on_cpu(nn.Sequential(layer), winograd=True)[0]
    assert type(changed) is WinogradUpsample
    assert changed.conv.filters(x, 32, 48)
    torch.testing.assert_close(changed(x), layer(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(changed(x, (31, 48)), layer(x, (31, 48)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(128, 128, 3, padding=1, stride=2),
        nn.Conv2d(128, 128, 3, padding=2, dilation=2),
        nn.Conv2d(128, 128, 3, padding=1, groups=2),
        nn.Conv2d(128, 128, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(128, 128, 1, groups=2),
        nn.Conv2d(128, 128, 3),
    ],
    ids=str,
)
def test_other_convolutions_are_left_to_pytorch(conv):
    changed = on_cpu(nn.Sequential(conv), winograd=True, onednn_linear=HAS_ONEDNN)[0]
    for x in (made(1, 128, 32, 32), made(1, 128, 7, 5)):
        torch.testing.assert_close(changed(x), conv(x), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_an_upsampler_that_tiles_is_left_to_pytorch():
    x, layer = made(1, 128, 16, 24), Upsample2D(128)
    layer.conv.padding_mode = "circular"
    changed = on_cpu(nn.Sequential(layer), winograd=True)[0]
    torch.testing.assert_close(changed(x), layer(x))
    later = on_cpu(nn.Sequential(Upsample2D(128)), winograd=True)[0]
    later.conv.padding_mode = "circular"
    torch.testing.assert_close(
        later(x), F.conv2d(F.pad(F.interpolate(x, scale_factor=2.0), (1, 1, 1, 1), mode="circular"), later.conv.weight,
                           later.conv.bias),
    )  # fmt: skip


@torch.no_grad()
def test_a_hooked_convolution_is_called():
    x, conv, seen = made(1, 128, 32, 32), nn.Sequential(nn.Conv2d(128, 128, 3, padding=1)), []
    changed = on_cpu(conv, winograd=True)
    changed[0].register_forward_hook(lambda *_: seen.append(True))
    changed(x)
    assert seen


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_where_a_gradient_is_wanted_it_comes_from_pytorch(trained):
    for layer, x in ((nn.Conv2d(128, 128, 3, padding=1), made(1, 128, 32, 32)), (nn.Linear(8, 8), made(3, 8))):
        network = nn.Sequential(layer.requires_grad_(False))
        passes.apply(network, "unet", Choices({**passes.OFF, "winograd": True, "onednn_linear": HAS_ONEDNN}, rows=1))
        assert type(layer) in (CpuConv2d, OneDNNLinear) or not HAS_ONEDNN
        layer.get_parameter(trained).requires_grad_()
        network(x).sum().backward()
        assert layer.get_parameter(trained).grad is not None


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 5, 7), (2, 3, 4, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_are_those_of_pytorch(shape, bias):
    x, layer = made(*shape).contiguous(), nn.Linear(7, 11, bias)
    torch.testing.assert_close(onednn.linear(x, layer.weight, layer.bias), layer(x))


@torch.no_grad()
def test_half_precision_is_left_to_pytorch():
    x, layer = made(3, 8).bfloat16(), nn.Linear(8, 8).bfloat16()
    assert torch.equal(onednn.linear(x, layer.weight, layer.bias), layer(x))


def test_layers_take_another_class_and_their_own_again():
    class Somebodys(nn.Linear):
        pass

    layers = nn.ModuleList([nn.Linear(2, 2), TokenProjection(2, 2), Somebodys(2, 2), nn.Embedding(2, 2)])
    own = [type(layer) for layer in layers]
    changes = passes.apply(layers, "text_encoder", Choices({**passes.OFF, "onednn_linear": True}, rows=1))
    assert [type(layer) for layer in layers] == [OneDNNLinear, OneDNNTokenProjection, Somebodys, nn.Embedding]
    changes.undo()
    assert [type(layer) for layer in layers] == own


@torch.no_grad()
def test_a_unet_answers_the_same_to_much_more_than_fifty_decibels():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=[128, 192],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    x, text = made(2, 4, 36, 28), made(2, 9, 16, seed=1)
    plain = unet(x, 400.0, text).sample
    passes.apply(unet, "unet", Choices({**passes.OFF, "winograd": True, "onednn_linear": HAS_ONEDNN}, rows=2))
    fast = unet(x, 400.0, text).sample
    assert not torch.equal(fast, plain)
    noise = (fast - plain).pow(2).mean() / plain.pow(2).mean()
    assert -10 * noise.log10() > 95
