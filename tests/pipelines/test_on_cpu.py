"""What the plan has a CPU do otherwise than PyTorch would: the same pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import russet
from russet.backends.cpu.convolution import CpuConv2d
from russet.backends.cpu.linear import OneDNNLinear
from russet.text.tokenizer import CLIPTokenizer

PROMPT = "a photo of an astronaut riding a horse on mars"


@pytest.fixture(scope="module")
def wide() -> Any:
    """A pipeline whose channels are many enough for Winograd's convolutions, with random weights."""
    torch.manual_seed(0)
    unet = russet.UNet2DConditionModel(
        block_out_channels=[128, 160],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        sample_size=32,
    )
    vae = russet.AutoencoderKL(
        block_out_channels=[96, 128],
        layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        sample_size=64,
    )
    text = russet.CLIPTextModel(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=77
    )
    mini = Path(russet.__file__).parent / "mini" / "tokenizer"
    pipe = russet.StableDiffusionPipeline(
        unet=unet.requires_grad_(False),
        vae=vae.requires_grad_(False),
        text_encoder=text.requires_grad_(False),
        tokenizer=CLIPTokenizer.from_files(mini),
        scheduler=russet.DDIMScheduler(),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_fast_paths_and_plain_operations_draw_the_same_picture(wide: Any) -> None:
    settings = {"num_inference_steps": 3, "output_type": "np", "seed": 3}
    block, seen = wide.unet.down_blocks[0], []
    feed_forward = block.attentions[0].transformer_blocks[0].ff
    hook = wide.unet.register_forward_pre_hook(
        lambda *_: seen.append((type(block.resnets[0].conv1), type(feed_forward.net[2])))
    )
    fast = wide(PROMPT, **settings)
    hook.remove()
    conv, linear = seen[0]
    assert fast.plan["winograd"]
    assert conv is CpuConv2d
    assert (linear is OneDNNLinear) == fast.plan["onednn_linear"]
    assert type(feed_forward.net[2]) is torch.nn.Linear, "a plain network again"
    wide.disable_fast_paths()
    plain = wide(PROMPT, **settings)
    wide.enable_fast_paths()
    assert not plain.plan["winograd"]
    assert not np.array_equal(fast.images, plain.images)
    assert -10 * np.log10(np.square(fast.images - plain.images).mean()) > 80
