"""Winograd's convolutions against PyTorch's, and their rounding against exact results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from russet.backends.cpu import winograd, winograd_heuristics


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, exact: Tensor) -> float:
    """Root mean square, in parts of that of the exact results."""
    return float((found - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())


@pytest.fixture(params=["at once", "in parts", "weights in parts"])
def way(request, monkeypatch):
    """All at once; bands of rows, with all weights; all maps, with a few filters at a time."""
    if request.param == "in parts":
        monkeypatch.setattr(winograd_heuristics, "WHOLE", 0)
        monkeypatch.setattr(winograd_heuristics, "MAPS_AT_ONCE", 5000)
    elif request.param == "weights in parts":
        monkeypatch.setattr(winograd_heuristics, "WEIGHTS_AT_ONCE", 1000)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (1, 3, 1, 1), (3, 4, 9, 14), (1, 6, 2, 23), (1, 8, 17, 4)], ids=str)
@pytest.mark.parametrize("rows", [None, 1, "all"])
def test_results_are_those_of_a_convolution(shape, rows):
    x, weight = made(*shape), made(7, shape[1], 3, 3, seed=1)
    shift = None if rows is None else made(shape[0] if rows == "all" else 1, 7, seed=2)
    expected = F.conv2d(x, weight, padding=1) + (0 if shift is None else shift[:, :, None, None])
    found = winograd.convolved(x, weight, shift)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found = winograd.convolved(*(t.contiguous(memory_format=torch.channels_last) for t in (x, weight)), shift)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (1, 3, 1, 1), (3, 4, 5, 7), (1, 6, 9, 2)], ids=str)
def test_doubled_maps_are_those_with_every_pixel_twice_along_both_sides(shape):
    x, weight, shift = made(*shape), made(7, shape[1], 3, 3, seed=1), made(1, 7, seed=2)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, shift[0], padding=1)
    torch.testing.assert_close(winograd.convolved(x, weight, shift, doubled=True), expected, rtol=1e-4, atol=1e-4)


def test_the_rounding_is_at_most_a_few_times_that_of_a_plain_convolution():
    x, weight = made(1, 320, 16, 16), made(320, 320, 3, 3, seed=1) / 54
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    plain = error(F.conv2d(x, weight, padding=1), exact)
    assert error(winograd.convolved(x, weight), exact) < max(8 * plain, 3e-6)  # which is 110 dB


def test_the_transforms_are_exact():
    results, weights, maps = winograd.one_sided()
    given, filters = [3, -1, 4, 1, -5, 9], [2, -6, 5]

    def applied(matrix, vector):
        return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]

    products = [a * b for a, b in zip(applied(maps, given), applied(weights, filters), strict=True)]
    assert applied(results, products) == [
        sum(given[i + k] * filters[k] for k in range(winograd.REACH)) for i in range(winograd.TILE)
    ]


def test_it_is_worth_it_for_many_channels_and_many_tiles():
    assert winograd_heuristics.pays(2, 320, 320, 64, 64)
    assert winograd_heuristics.pays(1, 128, 128, 512, 512)
    assert winograd_heuristics.pays(2, 1280, 1280, 16, 16)
    assert not winograd_heuristics.pays(2, 64, 64, 64, 64)
    assert not winograd_heuristics.pays(2, 320, 4, 64, 64)
    assert not winograd_heuristics.pays(2, 1280, 1280, 8, 8)
