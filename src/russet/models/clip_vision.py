"""CLIP's image encoder: from pixels to one vector per picture (arXiv:2103.00020, section 2.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from russet.errors import InputError
from russet.models.base import Model, as_input, require_tensor
from russet.models.clip import CLIPEncoder, CLIPTowerConfig


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(CLIPTowerConfig):
    """The JSON keys of CLIP's vision tower; ``image_size`` and ``patch_size`` in pixels.

    Raises:
        ConfigError: a value that cannot be built.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32

    def check(self) -> None:
        super().check()
        for name in ("num_channels", "image_size", "patch_size"):
            self.require_positive(name)
        fits = self.patch_size <= self.image_size
        self.require(fits, f"patch_size {self.patch_size} is larger than image_size {self.image_size}")


class CLIPVisionOutput(NamedTuple):
    """What the vision tower says of pictures.

    Attributes:
        last_hidden_state: [B, N, D], not normalised: a class token, then the patches row by row.
        pooler_output: [B, D], the class token, normalised.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor


class CLIPVisionProjectionOutput(NamedTuple):
    """What the vision model with a projection says of pictures.

    Attributes:
        image_embeds: [B, P], the projected class token.
        last_hidden_state: [B, N, D], not normalised: a class token, then the patches row by row.
    """

    image_embeds: Tensor
    last_hidden_state: Tensor


class VisionEmbeddings(nn.Module):
    """Patches of a picture as vectors, a learned class token before them, positions added."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        patch, dim = config.patch_size, config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.patch_embedding = nn.Conv2d(config.num_channels, dim, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, dim)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = as_input(pixels, self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        return tokens + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """The tower: embeddings, a norm, layers, and the normalised class token."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # spelled as in the checkpoints
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> CLIPVisionOutput:
        require_tensor("pixel_values", pixels)
        shape = self.config.num_channels, self.config.image_size, self.config.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != shape:
            raise InputError(
                f"pixel_values must have the shape [B, {shape[0]}, {shape[1]}, {shape[2]}], not {list(pixels.shape)}"
            )
        x = self.pre_layrnorm(self.embeddings(pixels))
        last = self.encoder(x)[-1]
        return CLIPVisionOutput(last, self.post_layernorm(last[:, 0]))


class CLIPVisionModelWithProjection(Model):
    """The image encoder that IP-Adapters and variations of a picture use.

    Args:
        config: the config, as an object or a dict; ``changes`` are single values that win over it.

    Raises:
        ConfigError: the config cannot be built.
    """

    config_class: ClassVar[type[CLIPVisionConfig]] = CLIPVisionConfig
    config: CLIPVisionConfig

    def __init__(self, config: Mapping[str, Any] | None = None, **changes: Any) -> None:
        super().__init__(CLIPVisionConfig.of(config, changes))
        self.vision_model = VisionTransformer(self.config)
        self.visual_projection = nn.Linear(self.config.hidden_size, self.config.projection_dim, bias=False)
        self.eval()

    def forward(self, pixel_values: Tensor) -> CLIPVisionProjectionOutput:
        """Encodes pictures [B, C, H, W], resized and normalised as the preprocessor's config says.

        Raises:
            InputError: the pictures do not have the size that this model was made for.
        """
        seen = self.vision_model(pixel_values)
        return CLIPVisionProjectionOutput(self.visual_projection(seen.pooler_output), seen.last_hidden_state)
