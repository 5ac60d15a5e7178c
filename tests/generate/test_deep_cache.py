"""A UNet's output from a deep map of an earlier call, on the plain network and with passes applied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from russet import passes
from russet.generate.deep_cache import from_deep_map
from russet.models.unet import UNet2DConditionModel
from russet.passes.base import Choices

TINY: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
THREE: dict[str, Any] = {
    **TINY,
    "block_out_channels": (16, 32, 48),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "SD 1": {**TINY, "layers_per_block": 2},
    "three levels": THREE,
    "no middle": {**TINY, "mid_block_type": None},
    "middle without attention": {**TINY, "mid_block_type": "UNetMidBlock2D"},
    "scale and shift": {**TINY, "resnet_time_scale_shift": "scale_shift"},
    "only cross-attention": {**TINY, "only_cross_attention": True},
    "layers per block": {**TINY, "layers_per_block": (2, 1)},
    "centred": {**TINY, "center_input_sample": True},
    "LCM": {**TINY, "time_cond_proj_dim": 5},
}
PASSES = {"plain": {}, "with passes": {"buffer_donation": True, "shared_prefix": True}}


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def unet(config: dict[str, Any], wanted: dict[str, Any]) -> Any:
    made = UNet2DConditionModel(config).requires_grad_(False)
    passes.apply(made, "unet", Choices({**passes.OFF, **wanted}, rows=2))
    return made


@pytest.mark.parametrize("wanted", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("name", VARIANTS)
def test_from_its_own_deep_map_a_call_gives_the_same_at_every_branch(name: str, wanted: dict[str, Any]) -> None:
    network = unet(VARIANTS[name], wanted)
    x, context = seeded(2, 4, 13, 6), seeded(2, 7, 12, seed=1)
    cond = seeded(2, 5, seed=2) if "time_cond_proj_dim" in VARIANTS[name] else None
    expected = network(x, 601, context, timestep_cond=cond).sample
    emb = network.embed(x, 601, cond, None, None)
    for branch in range(len(network.output_stages)):
        output, deep_map = from_deep_map(network, x, emb, context, branch, None)
        assert torch.equal(output, expected)
        kept = deep_map.clone()
        again, same = from_deep_map(network, x, emb, context, branch, deep_map)
        assert torch.equal(again, expected)
        assert same is deep_map
        assert torch.equal(deep_map, kept), "it serves more calls"


@pytest.mark.parametrize("wanted", PASSES.values(), ids=PASSES)
def test_a_call_from_a_deep_map_computes_only_what_lies_outside_of_it(wanted: dict[str, Any]) -> None:
    network = unet(THREE, wanted)
    x, context = seeded(1, 4, 8, 8), seeded(1, 7, 12, seed=1)
    emb = network.embed(x, 600, None, None, None)
    _, kept = from_deep_map(network, x, emb, context, 1, None)
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, part=part: ran.append(part))
        for part, module in network.named_modules()
        if part.split(".")[-2:-1] == ["resnets"]
    ]
    moved, _ = from_deep_map(network, x + 1, emb, context, 1, kept)
    assert ran == ["down_blocks.0.resnets.0", "up_blocks.2.resnets.0", "up_blocks.2.resnets.1"]
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(moved, network(x + 1, 600, context).sample)
    assert not torch.allclose(moved, from_deep_map(network, x + 1, emb, context, 1, kept + 1)[0])
