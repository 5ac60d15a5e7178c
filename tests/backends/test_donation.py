"""Maps that are donated: who holds them, and when their memory is free or another's."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from russet import passes
from russet.backends.blocks.resnet import OptimizedResnet
from russet.backends.donation import Donated, taken
from russet.backends.ops import EagerOps
from russet.models.resnet import ResnetBlock2D, ResnetStyle
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL
from russet.passes.base import Choices

STYLE = ResnetStyle(groups=2, eps=1e-5)
DONATING = Choices({**passes.OFF, "buffer_donation": True}, rows=2)
VAE = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
UNET = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}


class Overwriting(EagerOps):
    """Operations that put a norm's result in place of a donated map, as kernels for CUDA do, and note what is alive."""

    writes_in_place = True

    def __init__(self) -> None:
        self.overwritten: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def group_norm(self, x: Any, norm: Any, act: Any = None, shift: Any = None, *, donated: bool = False) -> Any:
        self.alive.append(sum(x() is not None for x in self.overwritten))
        y = super().group_norm(x, norm, act, shift)
        if donated:
            self.overwritten.append(weakref.ref(x))
        return x.copy_(y) if donated else y


def overwriting(network: nn.Module) -> Overwriting:
    """Applies the pass, and hands such operations to all blocks."""
    passes.apply(network, "unet", DONATING)
    ops = Overwriting()
    for module in network.modules():
        if hasattr(module, "ops"):
            module.ops = ops
    return ops


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def test_a_map_is_held_by_its_taker_alone() -> None:
    seen = []

    class Layer(nn.Module):
        def forward(self, given: Tensor | Donated) -> Tensor:
            x = taken(given)
            there = weakref.ref(x)
            y = x + 1
            del x
            seen.append(there())
            return y

    layer = Layer()
    given = Donated(seeded(2, 3))
    layer(given)
    assert seen == [None]
    with pytest.raises(AssertionError, match="once"):
        given.take()
    x = seeded(2, 3)
    layer(x)
    assert seen[1] is x


def test_a_donated_map_is_free_before_the_second_norm() -> None:
    gc.collect()
    block = ResnetBlock2D(4, 8, STYLE)
    expected = block(x := seeded(2, 4, 6, 6))
    ops = overwriting(block)
    assert isinstance(block, OptimizedResnet)
    torch.testing.assert_close(block(Donated(x.clone())), expected)
    assert ops.alive == [0, 0]
    assert len(ops.overwritten) == 2, "the second norm's input is the block's own"
    torch.testing.assert_close(block(x), expected)
    assert len(ops.overwritten) == 3, "and what was not donated is kept"


def test_a_decoder_and_a_unet_give_the_same_where_maps_are_overwritten() -> None:
    vae, z = AutoencoderKL(VAE), seeded(2, 4, 6, 5)
    unet, x, text = UNet2DConditionModel(UNET), seeded(2, 4, 9, 6), seeded(2, 7, 8)
    for network, call in ((vae, lambda: vae.decode(z).sample), (unet, lambda: unet(x, 1.0, text).sample)):
        expected, ops = call(), overwriting(network)
        torch.testing.assert_close(call(), expected)
        assert max(ops.alive) == 0
        assert ops.overwritten


def test_a_map_of_a_decoder_that_somebody_looks_at_stays_as_it_was() -> None:
    vae, kept = AutoencoderKL(VAE), []
    upsample = vae.decoder.up_blocks[0].upsamplers[0]
    upsample.register_forward_hook(lambda _, given, result: kept.extend((result, result.clone())))
    overwriting(vae)
    vae.decode(seeded(1, 4, 6, 5))
    assert torch.equal(*kept)
