"""Convolutions of doubled maps as transposed ones: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from russet.backends import upsample_heuristics
from russet.models.footprint import Arithmetic, Walk
from russet.models.resnet import Upsample2D
from russet.passes import upsample_fusion

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where conftest.py asks for the interpreter
pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from russet.backends.triton import layers, ops, upsample  # noqa: E402
from russet.backends.triton.layers import TransposedUpsample  # noqa: E402


@pytest.fixture(autouse=True)
def _without_gradients(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.no_grad():
        yield


@pytest.fixture
def _on_a_gpu(monkeypatch):
    """Layers as they are on a GPU, in the interpreter too, with a rule that small maps fulfil as well."""
    for module in (ops, layers):
        monkeypatch.setattr(module, "computes", lambda x: True)
    monkeypatch.setattr(upsample_heuristics, "WORTH", 1)


def doubled(
    x: torch.Tensor,
    conv: nn.Conv2d,
    kind: type[Upsample2D] = TransposedUpsample,
    size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """What an upsampler with this convolution makes of a map."""
    layer = kind(1)
    layer.conv = conv
    return layer(x, size)


def layer(inputs: int, outputs: int, **more) -> nn.Conv2d:
    torch.manual_seed(7)
    conv = nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **more}).to(DEVICE)
    return conv.to(memory_format=torch.channels_last)


def made(*shape: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return x.contiguous(memory_format=torch.channels_last)


def taps(weight: torch.Tensor) -> torch.Tensor:
    """The 4×4 weights by their definition: the kernel flipped, at the four places that a doubled pixel is seen from."""
    flipped = weight.double().flip(2, 3)
    wide = flipped.new_zeros(*weight.shape[:2], 4, 4)
    for down in (0, 1):
        for across in (0, 1):
            wide[:, :, down : down + 3, across : across + 3] += flipped
    return wide.transpose(0, 1)


@pytest.mark.parametrize("channels", [(5, 3), (64, 32), (70, 96)], ids=str)
@pytest.mark.parametrize("laid", [torch.channels_last, torch.contiguous_format], ids=str)
def test_weights_are_sums_as_defined_and_laid_for_channels_last_maps(channels, laid):
    weight = layer(*channels).weight.detach().contiguous(memory_format=laid)
    found = upsample.gathered_weights(weight)
    torch.testing.assert_close(found.double(), taps(weight))
    assert found.is_contiguous(memory_format=torch.channels_last)
    half = upsample.gathered_weights(weight.half())  # added up in float32, and rounded once
    assert torch.equal(half, taps(weight.half()).half())


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("size", [(2, 6, 5, 7), (1, 3, 1, 1), (3, 20, 1, 4), (2, 8, 9, 2)], ids=str)
def test_a_transposed_convolution_is_that_of_the_doubled_map(size):
    conv, x = layer(size[1], 10), made(*size)
    exact = F.interpolate(x, scale_factor=2, mode="nearest").double()
    exact = F.conv2d(exact, conv.weight.double(), conv.bias.double(), padding=1)
    found = doubled(x, conv)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, doubled(x, conv, Upsample2D), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("_on_a_gpu")
def test_a_convolution_without_a_bias_is_doubled_too():
    conv, x = layer(6, 4, bias=False), made(1, 6, 3, 4)
    torch.testing.assert_close(doubled(x, conv), doubled(x, conv, Upsample2D), rtol=1e-5, atol=1e-5)


def ways_to_differ():
    yield "stride", layer(8, 8, stride=2)
    yield "padding", layer(8, 8, padding=2)
    yield "dilation", layer(8, 8, dilation=2)
    yield "groups", layer(8, 8, groups=2)
    yield "padding mode", layer(8, 8, padding_mode="reflect")


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(("name", "conv"), list(ways_to_differ()), ids=[name for name, _ in ways_to_differ()])
def test_other_convolutions_are_left_alone(name, conv):
    x = made(1, 8, 4, 4)
    assert upsample.takes(x, layer(8, 8))
    assert not upsample.takes(x, conv), name


@pytest.mark.usefixtures("_on_a_gpu")
def test_weights_of_another_dtype_are_left_alone():
    x, conv = made(1, 8, 4, 4), layer(8, 8)
    assert not upsample.takes(x.half(), conv)
    assert not upsample.takes(x.double(), layer(8, 8).double())
    assert upsample.takes(x.bfloat16(), layer(8, 8).bfloat16())


@pytest.mark.usefixtures("_on_a_gpu")
def test_where_a_gradient_is_wanted_pytorch_computes(monkeypatch):
    monkeypatch.setattr(upsample, "upsampled", lambda *_: pytest.fail("the kernel has no gradient"))
    conv = layer(8, 8).requires_grad_(True)
    with torch.enable_grad():
        doubled(made(1, 8, 4, 4), conv).sum().backward()
    assert conv.weight.grad is not None


def test_small_maps_do_not_pay_and_neither_do_numbers_beyond_32_bits():
    assert upsample_heuristics.pays(2, 640, 640, 32, 32)
    assert upsample_heuristics.pays(32, 1280, 1280, 8, 8)
    assert upsample_heuristics.pays(1, 256, 256, 256, 256)
    assert upsample_heuristics.pays(2, 1280, 1280, 16, 16)
    assert not upsample_heuristics.pays(2, 1280, 1280, 8, 8)
    assert not upsample_heuristics.pays(8, 256, 256, 512, 512)


@pytest.mark.parametrize(("side", "transposed"), [(15, False), (16, True)])
def test_the_layer_goes_by_the_rule(side, transposed, monkeypatch):
    for module in (ops, layers):
        monkeypatch.setattr(module, "computes", lambda x: True)
    calls = []
    monkeypatch.setattr(F, "conv_transpose2d", lambda *a, **k: calls.append(1) or torch.conv_transpose2d(*a, **k))
    conv, x = layer(8, 8), made(1, 8, side, 32)
    torch.testing.assert_close(doubled(x, conv), doubled(x, conv, Upsample2D), rtol=1e-5, atol=1e-5)
    assert bool(calls) == transposed
    calls.clear()
    assert doubled(x, conv, size=(2 * side + 1, 64)).shape[2:] == (2 * side + 1, 64)  # not doubled to the pixel
    assert not calls


def test_the_doubled_map_is_not_predicted_where_there_is_none():
    how = Arithmetic(width=2, upsample_workspace=upsample_fusion.workspace)

    def peak(side: int, how: Arithmetic, area: int | None = None) -> int:
        walk = Walk(2, how, {})
        walk.upsample(walk.map(side * side, 64), 64, 4 * side * side if area is None else area)
        return walk.peak

    small, large = 2 * 32 * 32 * 64 * 2, 2 * 64 * 64 * 64 * 2
    assert peak(32, how) == small + large + 16 * 64 * 64 * 2
    assert peak(32, Arithmetic(width=2)) == small + 2 * large
    assert peak(15, how) == peak(15, Arithmetic(width=2))  # too small to pay
    assert peak(32, how, area=63 * 64) == peak(32, Arithmetic(width=2), area=63 * 64)  # not doubled to the pixel
