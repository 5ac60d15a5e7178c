from __future__ import annotations

import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import russet
from russet.errors import ConfigError
from russet.models.unet import UNet2DConditionModel
from russet.models.unet_config import UNetConfig

MINI = Path(russet.__file__).parent / "mini"
SD1 = {"cross_attention_dim": 768}
SD2 = {
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
XL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
    "upcast_attention": None,
}
REFINER = {
    **XL,
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.skipif(not hasattr(torch.device, "__enter__"), reason="torch < 2 has no device as a context")
@pytest.mark.parametrize("config", [SD1, SD2, XL, REFINER], ids=["SD 1.5", "SD 2.1", "XL", "XL refiner"])
def test_full_size_weights_have_the_names_and_shapes_of_diffusers(config):
    with torch.device("meta"):
        assert shapes(UNet2DConditionModel(config)) == shapes(diffusers.UNet2DConditionModel(**config))


def test_the_embedded_model_fits():
    ours = shapes(UNet2DConditionModel(json.loads((MINI / "unet/config.json").read_text())))
    found = {}
    for file in (MINI / "unet").glob("*.safetensors"):
        found.update({name: tensor.shape for name, tensor in load_file(file).items()})
    assert ours == found


def test_defaults_are_those_of_diffusers():
    parameters = inspect.signature(diffusers.UNet2DConditionModel).parameters
    reference = {name: parameter.default for name, parameter in parameters.items()}
    assert {name: UNetConfig()[name] for name in reference} == reference


def test_num_attention_heads_wins_over_the_misnamed_key():
    level = UNetConfig(num_attention_heads=(1, 2, 4, 8), attention_head_dim=64).down_levels[1]
    assert (level.heads, level.channels) == (2, 640)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 0}, "in_channels must be positive, not 0"),
        ({"in_channels": "4"}, "in_channels must be int"),
        ({"sample_size": (64, -1)}, "sample_size must be positive"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"block_out_channels": ()}, "block_out_channels is empty"),
        ({"block_out_channels": (320, 640)}, "must have 2 entries"),
        ({"layers_per_block": (2, 2)}, "layers_per_block .* must have 4 entries"),
        ({"layers_per_block": (2, 2, 0, 2)}, "layers_per_block must be positive"),
        ({"attention_head_dim": (8, 8, 8)}, "attention_head_dim .* must have 4 entries"),
        ({"only_cross_attention": (True,)}, "only_cross_attention .* must have 4 entries"),
        ({"cross_attention_dim": (768, 768, 768, 1024)}, "must be the same in all blocks"),
        ({"attention_head_dim": 7}, "320 channels cannot be shared equally by 7 heads"),
        ({"attention_head_dim": -8}, "attention_head_dim must be positive"),
        ({"norm_num_groups": 48}, "cannot form norm_num_groups=48 equal groups"),
        ({"norm_num_groups": 0}, "norm_num_groups must be positive"),
        ({"block_out_channels": (321, 640, 1280, 1280), "norm_num_groups": 1}, "shared equally|must be even"),
        ({"down_block_types": ("AttnDownBlock2D",) * 4}, "'AttnDownBlock2D' is not supported"),
        ({"up_block_types": ("DownBlock2D",) * 4}, "up_block_types: 'DownBlock2D' is not supported"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"transformer_layers_per_block": (1, 1, (2, 2), 1)}, "needs reverse_transformer_layers_per_block"),
        ({"transformer_layers_per_block": -1}, "must not be negative"),
        (
            {
                "transformer_layers_per_block": (1, 1, (2, 2, 2), 1),
                "reverse_transformer_layers_per_block": (1, 1, 1, 1),
            },
            "must have 2 entries, one for each residual block",
        ),
        ({"act_fn": "snake"}, "act_fn 'snake' is not supported"),
        ({"conv_in_kernel": 4}, "conv_in_kernel must be odd"),
        ({"downsample_padding": 2}, "downsample_padding"),
        ({"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift"),
        ({"class_embed_type": "identity"}, "class_embed_type"),
        ({"class_embed_type": "projection"}, "needs projection_class_embeddings_input_dim"),
        ({"num_class_embeds": 0}, "num_class_embeds must be positive"),
        ({"addition_embed_type": "text"}, "addition_embed_type"),
        ({"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 8}, "addition_time_embed_dim"),
        ({"addition_time_embed_dim": 7}, "addition_time_embed_dim must be even"),
        ({"freq_shift": 160}, "freq_shift must be from 0 to 159, not 160"),
        ({"dual_cross_attention": True}, "dual_cross_attention True is not supported; only False is"),
        ({"attention_type": "gated"}, "attention_type 'gated'"),
        ({"encoder_hid_dim": 1280}, "encoder_hid_dim 1280"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"time_embedding_act_fn": "silu"}, "time_embedding_act_fn"),
        ({"timestep_post_act": "silu"}, "timestep_post_act"),
        ({"resnet_skip_time_act": True}, "resnet_skip_time_act"),
        ({"resnet_out_scale_factor": 0.7}, "resnet_out_scale_factor"),
        ({"class_embeddings_concat": True}, "class_embeddings_concat"),
        ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm"),
        ({"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_configs_that_cannot_be_built_are_refused_before_anything_is_built(changes, message):
    with pytest.raises(ConfigError, match=message):
        UNet2DConditionModel(**changes)


def test_an_unknown_keyword_is_refused_and_an_unknown_json_key_kept():
    with pytest.raises(ConfigError, match="widths"):
        UNet2DConditionModel(widths=3)
    config = UNetConfig.from_dict({"sample_size": 64, "_diffusers_version": "0.6.0", "future": 1})
    assert (config.sample_size, config["future"], config["_diffusers_version"]) == (64, 1, "0.6.0")
