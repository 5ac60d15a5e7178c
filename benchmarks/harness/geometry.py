"""The models that are timed: Stable Diffusion 1.5's shapes (or a tiny model's) with random weights, as a folder.

Weights are drawn as torch initialises them, which keeps every number finite in half precision and gives pictures with
some contrast. What the weights say has no influence on the time that the arithmetic takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PNDM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
}


@dataclass(frozen=True)
class Geometry:
    """The configs of one model, and the side in pixels of the picture that it is for."""

    name: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    side: int

    @property
    def factor(self) -> int:
        """Pixels per latent along an edge."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))


def vae_config(channels: tuple[int, ...], groups: int, side: int) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "norm_num_groups": groups,
        "sample_size": side,
    }


def text_config(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
    }


SD15 = Geometry(
    name="Stable Diffusion 1.5",
    unet={"sample_size": 64, "cross_attention_dim": 768},
    vae=vae_config((128, 256, 512, 512), 32, 512),
    text=text_config(768, 12, 12),
    side=512,
)
TINY = Geometry(
    name="tiny",
    unet={
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "layers_per_block": 1,
    },
    vae=vae_config((16, 32), 8, 32),
    text=text_config(32, 2, 2),
    side=32,
)
GEOMETRIES = {"sd15": SD15, "tiny": TINY}


def make_folder(folder: Path, geometry: Geometry, device: str) -> None:
    """Writes the model in half precision as a folder in Diffusers' form; the tokenizer is the embedded model's."""
    from russet.checkpoints import save
    from russet.checkpoints.arguments import MINI
    from russet.models.clip_text import CLIPTextModel
    from russet.models.unet import UNet2DConditionModel
    from russet.models.vae import AutoencoderKL
    from russet.schedulers.named import PNDMScheduler
    from russet.text.tokenizer import CLIPTokenizer

    torch.manual_seed(0)
    with torch.device(device):  # drawing a thousand million numbers takes a CPU longer than the whole benchmark a GPU
        made = {
            "unet": UNet2DConditionModel(geometry.unet),
            "vae": AutoencoderKL(geometry.vae),
            "text_encoder": CLIPTextModel(geometry.text),
        }
    parts = {name: model.to("cpu", torch.float16) for name, model in made.items()}
    others = {"tokenizer": CLIPTokenizer.from_files(MINI / "tokenizer"), "scheduler": PNDMScheduler(**PNDM)}
    absent = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    save.pipeline(folder, "StableDiffusionPipeline", {**parts, **others, **absent}, {"requires_safety_checker": False})


def operations(geometry: Geometry, side: int, batch: int = 1) -> dict[str, int]:
    """Floating-point operations of one guided UNet call and of decoding, by counting on tensors without memory.

    Counted are the products of convolutions, linear layers and attention; what is done to each number alone is not.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from russet.models.unet import UNet2DConditionModel
    from russet.models.vae import AutoencoderKL

    latent, features = side // geometry.factor, geometry.text["hidden_size"]
    with torch.device("meta"), torch.no_grad():
        unet, vae = UNet2DConditionModel(geometry.unet), AutoencoderKL(geometry.vae)
        x, z = torch.empty(2 * batch, 4, latent, latent), torch.empty(batch, 4, latent, latent)
        context = torch.empty(2 * batch, 77, features)
        counts = {}
        for name, call in {"unet": lambda: unet(x, 500.0, context), "decode": lambda: vae.decode(z)}.items():
            with FlopCounterMode(display=False) as counter:
                call()
            counts[name] = counter.get_total_flops()
    return counts
