"""Tiny random models of each family, as Diffusers saves them and as the original code would have saved them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import ldm_layout

VOCABULARY = 2944  # of mini's tokenizer
MINI = Path(__file__).parents[2] / "src" / "russet" / "mini"

UNET = ldm_layout.UNetParams(
    model_channels=32, channel_mult=(1, 2), attention_resolutions=(1,), num_res_blocks=1, context_dim=32
)
UNETS = {
    "sd1": UNET,
    "sd2": dataclasses.replace(UNET, use_linear_in_transformer=True),
    "sdxl": dataclasses.replace(
        UNET,
        context_dim=64,
        use_linear_in_transformer=True,
        attention_resolutions=(2,),
        transformer_depth=(1, 2),
        adm_in_channels=6 * 8 + 32,
    ),
    "sdxl-refiner": dataclasses.replace(
        UNET, use_linear_in_transformer=True, transformer_depth=(2, 2), adm_in_channels=5 * 8 + 32
    ),
}
TEXT_LAYERS = 11  # Diffusers tells SDXL by the tenth layer of its second text encoder


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original file."""
    made = ldm_layout.unet_file(UNETS[family], ema=family == "sd1")
    made |= ldm_layout.under("first_stage_model.", ldm_layout.vae(8, (1, 1, 2, 2), 1))
    clip = ldm_layout.clip(32, 3, VOCABULARY)
    openclip = ldm_layout.openclip(32, TEXT_LAYERS, VOCABULARY)
    texts = {
        "sd1": {"cond_stage_model.transformer.": clip},
        "sd2": {"cond_stage_model.model.": openclip},
        "sdxl": {"conditioner.embedders.0.transformer.": clip, "conditioner.embedders.1.model.": openclip},
        "sdxl-refiner": {"conditioner.embedders.0.model.": openclip},
    }
    for prefix, tensors in texts[family].items():
        made |= ldm_layout.under(prefix, tensors)
    return made


def original(family: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The tensors of the original file, random."""
    generator = torch.Generator().manual_seed(sum(map(ord, family)))
    found = {}
    for name, shape in shapes(family).items():
        if name.endswith("position_ids"):
            found[name] = torch.arange(77)[None]
        else:
            found[name] = torch.randn(shape, generator=generator).to(dtype) * 0.05
    return found


def write_original(
    path: Path, family: str, metadata: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    save_file(original(family, dtype), path, metadata={"format": "pt", **(metadata or {})})
    return path


def unet_config(family: str) -> dict[str, Any]:
    params = UNETS[family]
    level = [scale in params.attention_resolutions for scale in (1, 2)]
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in level],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in level[::-1]],
        "cross_attention_dim": params.context_dim,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "use_linear_projection": params.use_linear_in_transformer,
        "transformer_layers_per_block": list(params.transformer_depth[:2]),
    }
    if family == "sd2":
        config |= {"attention_head_dim": [2, 4], "upcast_attention": True}
    if params.adm_in_channels:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": params.adm_in_channels,
        }
    return config


VAE = {
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
}


def text_config(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": 32,
        "bos_token_id": 2942,
        "eos_token_id": 2943,
        "pad_token_id": 2943,
        **changes,
    }


OPENCLIP = text_config(hidden_act="gelu", num_hidden_layers=TEXT_LAYERS)


def configs(family: str) -> dict[str, Any]:
    """The configs of the tiny model as from_single_file takes them."""
    texts = {
        "sd1": {"text_encoder": text_config()},
        "sd2": {"text_encoder": {**OPENCLIP, "num_hidden_layers": TEXT_LAYERS - 1}},
        "sdxl": {"text_encoder": text_config(), "text_encoder_2": OPENCLIP},
        "sdxl-refiner": {"text_encoder_2": OPENCLIP},
    }
    return {"unet": unet_config(family), "vae": dict(VAE), **texts[family]}


def reference(family: str) -> Any:
    """The tiny model as a Diffusers pipeline, its weights random, to be replaced."""
    import diffusers
    import transformers

    parts = configs(family)
    made: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel(**parts["unet"]),
        "vae": diffusers.AutoencoderKL(**parts["vae"]),
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            prediction_type="v_prediction" if family == "sd2" else "epsilon",
        ),
    }
    for name, kind in (
        ("text_encoder", transformers.CLIPTextModel),
        ("text_encoder_2", transformers.CLIPTextModelWithProjection),
    ):
        if name in parts:
            made[name] = kind(transformers.CLIPTextConfig(**parts[name])).eval()
            made[name.replace("text_encoder", "tokenizer")] = transformers.CLIPTokenizer.from_pretrained(
                MINI / "tokenizer"
            )
    if family.startswith("sdxl"):
        made = {**dict.fromkeys(("text_encoder", "tokenizer")), **made}
        kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionXLImg2ImgPipeline
        return kind(**made)
    return diffusers.StableDiffusionPipeline(
        **made, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
