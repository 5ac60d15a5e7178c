"""Networks that the user compiles draw the same picture, with the plan's fast paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import russet

FAST = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent", "seed": 1}
UNET = {
    "sample_size": 8,
    "block_out_channels": (32,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
BACKENDS = ["eager", "aot_eager", "inductor"]

pytestmark = pytest.mark.skipif(not hasattr(torch, "compile"), reason="this torch has no compiler")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_unet_draws_the_same_picture(backend: str, mini: Any) -> None:
    torch.manual_seed(0)
    unet = russet.UNet2DConditionModel({**UNET, "cross_attention_dim": mini.unet.config.cross_attention_dim}).eval()
    mini.unet = unet
    expected = mini("a horse", **FAST).images
    mini.unet = torch.compile(unet, backend=backend)
    assert torch.allclose(mini("a horse", **FAST).images, expected, atol=1e-3)
