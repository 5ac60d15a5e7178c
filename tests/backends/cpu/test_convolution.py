"""The CPU's steps and linear layers against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from russet.backends.cpu.ops import OnCPU, few
from russet.models.linears import OneDNNLinear, OneDNNPointwise, set_linears
from torch import nn

from russet.backends.cpu import onednn
from russet.backends.ops import PLAIN
from russet.hardware.facts import read_facts
from russet.models.transformer import Pointwise
from russet.models.unet import UNet2DConditionModel

needs_onednn = pytest.mark.skipif(not read_facts("cpu").onednn, reason="this PyTorch has no oneDNN operation")
WAYS = [OnCPU(by_onednn=False), pytest.param(OnCPU(), marks=needs_onednn)]


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else numbers


@pytest.mark.parametrize("steps", WAYS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [None, 1, "all", "whole"])
@pytest.mark.parametrize("size", [3, 1])
def test_convolutions_are_those_of_pytorch(steps, bias, rows, size):
    x, conv = made(2, 128, 32, 32), nn.Conv2d(128, 96, size, padding=size // 2, bias=bias)
    assert size == 1 or steps.filters(x.detach(), conv.requires_grad_(False), 32, 32)
    shift = None if rows is None else made(1 if rows == 1 else 2, 96, seed=1)
    with torch.no_grad():
        expected, rest = PLAIN.convolved(x, conv, shift, whole=rows == "whole")
        assert rest is None
        found, rest = steps.convolved(x, conv, shift, whole=rows == "whole")
        assert rest is None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [None, 1, "all", "whole"])
def test_convolutions_of_few_places_are_those_of_pytorch(bias, rows):
    x, conv = made(2, 128, 7, 5), nn.Conv2d(128, 160, 3, padding=1, bias=bias).to(memory_format=torch.channels_last)
    assert few(x, conv)
    assert not few(made(2, 128, 16, 16), conv)
    assert not few(made(2, 128, 7, 5), nn.Conv2d(128, 4, 3, padding=1))
    shift = None if rows is None else made(1 if rows == 1 else 2, 160, seed=1)
    expected, _ = PLAIN.convolved(x, conv, shift, whole=rows == "whole")
    found, rest = OnCPU().convolved(x, conv, shift, whole=rows == "whole")
    assert rest is None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_doubled_maps_are_those_of_pytorch():
    x, conv = made(1, 128, 16, 24), nn.Conv2d(128, 128, 3, padding=1)
    torch.testing.assert_close(OnCPU().doubled(x, conv), PLAIN.doubled(x, conv), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(128, 128, 3, padding=1, stride=2),
        nn.Conv2d(128, 128, 3, padding=2, dilation=2),
        nn.Conv2d(128, 128, 3, padding=1, groups=2),
        nn.Conv2d(128, 128, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(128, 128, 3),
    ],
    ids=str,
)
def test_other_convolutions_are_left_to_pytorch(conv):
    x = made(1, 128, 32, 32)
    assert not OnCPU().filters(x, conv, 32, 32)
    assert torch.equal(OnCPU().convolved(x, conv)[0], PLAIN.convolved(x, conv)[0])


@torch.no_grad()
def test_a_watched_convolution_is_called():
    x, conv, seen = made(1, 128, 32, 32), nn.Conv2d(128, 128, 3, padding=1), []
    conv.register_forward_hook(lambda *_: seen.append(True))
    OnCPU().convolved(x, conv)
    assert seen


def test_where_a_gradient_is_wanted_it_comes_from_pytorch():
    x, conv = made(1, 128, 32, 32), nn.Conv2d(128, 128, 3, padding=1)
    OnCPU().convolved(x, conv)[0].sum().backward()
    assert conv.weight.grad is not None
    layer = nn.Linear(8, 8)
    set_linears([layer], "onednn")
    layer(made(3, 8)).sum().backward()
    assert layer.weight.grad is not None


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

    layers = [nn.Linear(2, 2), Pointwise(2, 2), Somebodys(2, 2), nn.Conv2d(2, 2, 1)]
    own = [type(layer) for layer in layers]
    set_linears(layers, "onednn")
    assert [type(layer) for layer in layers] == [OneDNNLinear, OneDNNPointwise, Somebodys, nn.Conv2d]
    set_linears(layers, "native")
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
    unet.set_elementwise(OnCPU(by_onednn=read_facts("cpu").onednn))
    set_linears(unet.modules(), "onednn" if read_facts("cpu").onednn else "native")
    fast = unet(x, 400.0, text).sample
    assert not torch.equal(fast, plain)
    noise = (fast - plain).pow(2).mean() / plain.pow(2).mean()
    assert -10 * noise.log10() > 95
