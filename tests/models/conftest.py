from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _the_same_random_weights_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shaken() -> Callable[[nn.Module], nn.Module]:
    """Moves every weight of a module off its initial value, so that none is a neutral 0 or 1."""

    def shake(module: nn.Module) -> nn.Module:
        make = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in module.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=make)
        return module.eval().requires_grad_(False)

    return shake


@pytest.fixture
def agree() -> Callable[..., None]:
    """Requires two results to agree within float32 rounding: 1e-5 of the largest value."""

    def check(ours: Tensor, reference: Tensor, tolerance: float = 1e-5) -> None:
        assert ours.shape == reference.shape
        assert ours.isfinite().all()
        scale = max(1.0, float(reference.abs().max()))
        assert float((ours - reference).abs().max()) <= tolerance * scale

    return check


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def randn() -> Callable[..., Tensor]:
    """The same random numbers for the same shape, whatever ran before."""
    return seeded
