"""Parameters that lie side by side in memory are the same parameters."""

from __future__ import annotations

import copy

import pytest
import torch

from russet.models.unet import UNet2DConditionModel

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "untyped_storage"), reason="torch 1.13 cannot tell what lies where, so nothing is joined"
)

CONFIG = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(CONFIG).requires_grad_(False)


@pytest.fixture
def answer(randn):
    x, text = randn(2, 4, 8, 8, seed=1), randn(2, 7, 12, seed=2)
    return lambda unet, t=500.0: unet(x.to(unet.dtype), t, text.to(unet.dtype)).sample


def products(unet: UNet2DConditionModel) -> int:
    return sum(together.whole is not None for together in unet._side_by_side())


def test_parameters_keep_their_names_and_values_and_take_no_more_memory(unet, answer):
    before, expected = {name: p.clone() for name, p in unet.state_dict().items()}, answer(unet)
    unet.lay_together()
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert products(unet) > 0
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in unet.parameters()}
    assert sum(storages.values()) == sum(p.numel() * p.element_size() for p in unet.parameters())
    torch.testing.assert_close(answer(unet), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answer(unet, torch.tensor([10.0, 900.0])).shape, expected.shape)


def test_the_time_of_each_row_is_its_own(unet, answer):
    times = torch.tensor([10.0, 900.0])
    expected = answer(unet, times)
    unet.lay_together()
    torch.testing.assert_close(answer(unet, times), expected, rtol=1e-5, atol=1e-5)


def test_laying_twice_moves_nothing(unet):
    unet.lay_together()
    places = [p.data_ptr() for p in unet.parameters()]
    unet.lay_together()
    assert [p.data_ptr() for p in unet.parameters()] == places


def test_a_change_in_place_is_seen(unet, answer):
    unet.lay_together()
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k.weight.mul_(-2)
    unet.mid_block.resnets[0].conv1.bias.add_(1)
    torch.testing.assert_close(answer(unet), answer(apart(unet)), rtol=1e-5, atol=1e-5)


def test_a_parameter_that_is_replaced_is_the_one_that_counts(unet, answer):
    unet.lay_together()
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.to_k.weight = torch.nn.Parameter(-2 * attention.to_k.weight, requires_grad=False)
    torch.testing.assert_close(answer(unet), answer(apart(unet)), rtol=1e-5, atol=1e-5)


def test_moving_undoes_it_and_keeps_no_memory(unet):
    unet.lay_together()
    unet.to(torch.float64)
    assert products(unet) == 0
    assert all(p.untyped_storage().nbytes() == p.numel() * 8 for p in unet.parameters())


def test_a_layer_that_is_watched_is_called(unet, answer):
    unet.lay_together()
    layer, called = unet.up_blocks[1].attentions[0].transformer_blocks[0].attn1.to_v, []
    layer.register_forward_hook(lambda *_: called.append(1))
    expected = answer(apart(unet))
    called.clear()
    torch.testing.assert_close(answer(unet), expected, rtol=1e-5, atol=1e-5)
    assert called == [1]


def test_gradients_reach_the_layers_own_parameters(unet, answer):
    unet.lay_together()
    unet.requires_grad_(True)
    answer(unet).sum().backward()
    assert all(p.grad is not None for p in unet.parameters())


def apart(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy whose parameters lie wherever they lie."""
    other = UNet2DConditionModel(CONFIG).requires_grad_(False)
    other.load_state_dict(copy.deepcopy(unet.state_dict()))
    return other
