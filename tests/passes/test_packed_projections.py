"""Parameters that are packed side by side in memory are the same parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from russet.backends.blocks.transformer import OptimizedAttention

from .cases import Ask, Case, near, unet, vae

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "untyped_storage"), reason="torch 1.13 cannot tell what lies where, so nothing is packed"
)
PACKED = Case("packed", {"packed_projections": True})


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def products(network: Any) -> int:
    return sum(isinstance(module, OptimizedAttention) and module.packed is not None for module in network.modules())


def places(network: Any) -> list[int]:
    return [parameter.data_ptr() for parameter in network.parameters()]


@pytest.mark.parametrize("make", [unet, vae])
def test_parameters_keep_their_names_and_values_and_take_hardly_more_memory(make: Any) -> None:
    network = make()
    before = {name: parameter.clone() for name, parameter in network.state_dict().items()}
    PACKED.apply(network)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    count = products(network)
    assert count == {unet: 4, vae: 2}[make]
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in network.parameters()}
    spare = 8 * 4 * 32 * count  # rows of zeros behind the weights, of 32 features at the most
    assert 0 <= sum(storages.values()) - sum(p.numel() * p.element_size() for p in network.parameters()) <= spare


def test_the_time_of_each_row_is_its_own() -> None:
    network, times = unet(), torch.tensor([10.0, 900.0])
    ask = Ask.of(network, images=2, texts=1)
    expected = network(ask.x, times, ask.context).sample
    PACKED.apply(network)
    near(network(ask.x, times, ask.context).sample, expected)


def test_packing_twice_moves_nothing() -> None:
    network = unet()
    PACKED.apply(network).undo()
    before = places(network)
    PACKED.apply(network)
    assert places(network) == before


def test_a_change_in_place_is_seen() -> None:
    network, other = unet(), unet()
    PACKED.apply(network)
    for one in (network, other):
        one.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k.weight.mul_(-2)
        one.mid_block.resnets[0].conv1.bias.add_(1)
    ask = Ask.of(network)
    near(ask.answer(network, PACKED), ask.answer(other))


def test_a_parameter_that_is_replaced_between_two_runs_is_the_one_that_counts() -> None:
    network = unet()
    PACKED.apply(network).undo()
    attention = network.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.to_k.weight = torch.nn.Parameter(-2 * attention.to_k.weight, requires_grad=False)
    ask = Ask.of(network)
    expected = ask.answer(network)
    PACKED.apply(network)
    near(ask.answer(network, PACKED), expected)


def test_after_undo_a_network_can_be_moved_and_keeps_no_memory() -> None:
    network = unet()
    PACKED.apply(network).undo()
    network.to(torch.float64)
    assert products(network) == 0
    assert all(p.untyped_storage().nbytes() == p.numel() * 8 for p in network.parameters())
