"""Sums within products change nothing but the number of operations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from russet.backends.blocks.resnet import OptimizedResnet
from russet.backends.blocks.transformer import OptimizedTransformer2D
from russet.backends.donation import Donated
from russet.backends.ops import EagerOps
from russet.models.attention import HAS_SDPA, chunked, fused, padded, sliced
from russet.models.resnet import ResnetBlock2D, ResnetStyle
from russet.passes import residual_fusion
from russet.passes.base import Changes
from russet.passes.blocks import optimize_blocks
from russet.passes.residual_fusion import ShortcutProduct

from .cases import PADDED, Ask, Case, near, seeded, together, unet

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "untyped_storage"), reason="torch 1.13 cannot tell what lies where, so nothing is packed"
)
ALL = together("mps")
FAST = Case("fast", {name: value for name, value in ALL.values.items() if name in
                     ("packed_projections", "residual_fusion", "timestep_embeddings", "prompt_cache")})  # fmt: skip
FUSION = Case("fusion", {"residual_fusion": "with weight copies"})
SHAPES = ("SD 1", "SD 2", "only cross-attention", "scale and shift")


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def attention_products(network: Any) -> list[Any]:
    fused = [module.fused_residuals for module in network.modules() if isinstance(module, OptimizedTransformer2D)]
    return [product for one in fused if one is not None for product in one._attention.values()]


@pytest.mark.parametrize(
    "attention",
    [fused, PADDED, padded(chunked(16), (8,)), sliced(1)],
    ids=["fused", "padded", "padded and chunked", "sliced"],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_together_gives_the_plain_answer(shape: str, attention: Any) -> None:
    network = unet(shape)
    network.set_attention(attention)
    ask = Ask.of(network)
    expected = ask.answer(network)
    FAST.apply(network)
    found = ask.answer(network, FAST)
    error = (found - expected).pow(2).mean() / expected.pow(2).mean()
    assert error < 1e-10  # 100 dB
    near(found, expected)


def test_heads_that_are_padded_by_copies_or_in_each_call_come_to_the_same(monkeypatch: Any) -> None:
    network = unet()
    network.set_attention(PADDED)
    ask = Ask.of(network)
    expected = ask.answer(network)
    for limit, dims in ((0, {4, 8}), (2**20, {6, 16})):
        monkeypatch.setattr(residual_fusion, "PADDED", limit)
        changes = FUSION.apply(network)
        assert {product.dim for product in attention_products(network)} == dims
        near(ask.answer(network, FUSION), expected)
        changes.undo()


def test_weights_that_change_between_runs_are_those_that_count() -> None:
    network = unet()
    FUSION.apply(network).undo()
    block = network.down_blocks[0].attentions[0].transformer_blocks[0]
    shortcut = network.up_blocks[0].resnets[0].conv_shortcut
    for layer in (block.attn1.to_out[0], block.attn1.to_v, block.ff.net[2], shortcut):
        for parameter in layer.parameters():
            parameter.mul_(-2).add_(0.1)
    ask = Ask.of(network)
    expected = ask.answer(network)
    FUSION.apply(network)
    near(ask.answer(network, FUSION), expected)


@pytest.mark.skipif(not HAS_SDPA, reason="counts the operations of torch's own attention")
def test_there_are_fewer_operations() -> None:
    network = unet()
    network.set_attention(PADDED)
    ask = Ask.of(network)

    def operations(case: Case) -> Counter[str]:
        changes = case.apply(network)
        with Operations() as counted:
            ask.answer(network, case)
        changes.undo()
        return counted.names

    before = operations(Case("packed", {"packed_projections": True, "prompt_cache": "keys and values"}))
    after = operations(FAST)
    # 4 transformers: residual sums of 3 parts each; 4 attentions to the text with their pads; 3 shortcuts
    assert before["add_"] - after["add_"] >= 3 * 4 + 3
    assert before["constant_pad_nd"] == 4 * 4  # the prompt's keys and values among them
    assert after["constant_pad_nd"] == 0


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_half_precision_stays_near() -> None:
    network = unet()
    ask = Ask.of(network)
    expected = ask.answer(network)
    network.to(torch.bfloat16)
    ask = Ask(ask.x.bfloat16(), ask.context.bfloat16(), {})
    plain = ask.answer(network)
    FAST.apply(network)
    found = ask.answer(network, FAST)

    def error(of: torch.Tensor) -> float:
        return float((of.float() - expected).pow(2).mean())

    assert error(found) < 1.5 * error(plain)


class Overwriting(EagerOps):
    """Operations that put a norm's result in place of a map that nothing needs any more, as kernels for CUDA do."""

    writes_in_place = True

    def group_norm(self, x: Any, norm: Any, act: Any = None, shift: Any = None, *, donated: bool = False) -> Any:
        y = super().group_norm(x, norm, act, shift)
        return x.copy_(y) if donated else y


def test_a_shortcut_within_a_product_reads_its_map_before_it_is_overwritten() -> None:
    torch.manual_seed(0)
    block, x = ResnetBlock2D(4, 8, ResnetStyle(groups=2, eps=1e-5)).requires_grad_(False), seeded(2, 4, 6, 6)
    expected = block(x)
    optimize_blocks(block, Changes(block))
    assert isinstance(block, OptimizedResnet)
    block.ops = Overwriting()
    torch.testing.assert_close(block(Donated(x.clone())), expected)
    block.shortcut_product = ShortcutProduct(block.conv2, block.conv_shortcut, 2)
    torch.testing.assert_close(block(Donated(x.clone())), expected, rtol=1e-5, atol=1e-5)
