"""Maps that are handed over: who holds them, and when their memory is free or another's."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from russet.models.spare import Spare, taken
from torch import Tensor, nn

from russet.backends.ops import Plain
from russet.models.resnet import Resnet, ResnetStyle
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL

STYLE = ResnetStyle(groups=2, eps=1e-5)
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


class Overwriting(Plain):
    """Steps that put a norm's result in place of a spare map, as kernels for CUDA do, and note which died when."""

    reuses = True

    def __init__(self) -> None:
        self.overwritten: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def normed(self, x: Any, norm: Any, act: Any = None, shift: Any = None, *, spare: bool = False) -> Any:
        self.alive.append(sum(x() is not None for x in self.overwritten))
        y = super().normed(x, norm, act, shift)
        if spare:
            self.overwritten.append(weakref.ref(x))
        return x.copy_(y) if spare else y


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def test_a_map_is_held_by_its_taker_alone(randn: Any) -> None:
    seen = []

    class Layer(nn.Module):
        def forward(self, given: Tensor | Spare) -> Tensor:
            x = taken(given)
            there = weakref.ref(x)
            y = x + 1
            del x
            seen.append(there())
            return y

    layer = Layer()
    given = Spare(randn(2, 3))
    given.into(layer)
    assert seen == [None]
    with pytest.raises(AssertionError, match="once"):
        given.take()
    x = randn(2, 3)
    layer(x)
    assert seen[1] is x


def test_who_watches_a_layer_is_shown_the_map(randn: Any) -> None:
    block, shown = Resnet(4, 8, STYLE), []
    block.register_forward_hook(lambda _, given, result: shown.append(given[0]))
    x = randn(2, 4, 6, 6)
    kept, block.steps = x.clone(), Overwriting()
    Spare(x).into(block)
    assert shown[0] is x
    assert torch.equal(x, kept)


def test_a_spare_map_is_free_before_the_second_norm(randn: Any) -> None:
    gc.collect()
    block, steps = Resnet(4, 8, STYLE), Overwriting()
    expected = block(x := randn(2, 4, 6, 6))
    block.steps = steps
    torch.testing.assert_close(Spare(x.clone()).into(block), expected)
    assert steps.alive == [0, 0]
    assert len(steps.overwritten) == 2, "the second norm's input is the block's own"
    torch.testing.assert_close(block(x), expected)
    assert len(steps.overwritten) == 3, "and what was not handed over is kept"


@pytest.mark.parametrize("layer", ["conv_shortcut", "conv1"])
def test_what_a_hook_may_have_kept_is_not_overwritten(layer: str, randn: Any) -> None:
    block = Resnet(4, 8, STYLE)
    block.steps, kept = Overwriting(), []
    getattr(block, layer).register_forward_hook(lambda _, given, result: kept.extend((given[0], result)))
    Spare(x := randn(2, 4, 6, 6)).into(block)
    again = block.conv_shortcut(x) if layer == "conv_shortcut" else None
    assert torch.equal(kept[1], block.conv1(kept[0]) if again is None else again)


def test_a_decoder_and_a_unet_give_the_same_where_maps_are_overwritten(randn: Any) -> None:
    vae, z = AutoencoderKL(VAE), randn(2, 4, 6, 5)
    unet, x, text = UNet2DConditionModel(UNET), randn(2, 4, 9, 6), randn(2, 7, 8)
    for network, call in ((vae, lambda: vae.decode(z).sample), (unet, lambda: unet(x, 1.0, text).sample)):
        expected, steps = call(), Overwriting()
        network.set_elementwise(steps)
        torch.testing.assert_close(call(), expected)
        assert max(steps.alive) == 0
        assert steps.overwritten


def test_a_map_of_a_decoder_that_somebody_looks_at_stays_as_it_was(randn: Any) -> None:
    vae, kept = AutoencoderKL(VAE), []
    vae.set_elementwise(Overwriting())
    upsample = vae.decoder.up_blocks[0].upsamplers[0]
    upsample.register_forward_hook(lambda _, given, result: kept.extend((result, result.clone())))
    vae.decode(randn(1, 4, 6, 5))
    assert torch.equal(*kept)
