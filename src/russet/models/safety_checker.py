"""The safety checker that ships with Stable Diffusion 1: which pictures lie close to unwanted concepts.

It compares a picture's CLIP vector with 17 concepts, each with a threshold, and with 3 that call for special care and
lower those thresholds (arXiv:2210.04610 describes it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from russet.config import Config
from russet.models.base import Model
from russet.models.clip_vision import CLIPVisionConfig, VisionTransformer

CONCEPTS = 17
SPECIAL_CONCEPTS = 3
SPECIAL_CARE = 0.01  # how much closer every concept counts as where a special one fires


@dataclass(frozen=True, kw_only=True)
class SafetyCheckerConfig(Config):
    """The JSON keys of ``StableDiffusionSafetyChecker``: those of a whole CLIP, of which it uses the vision side.

    Raises:
        ConfigError: a value that cannot be built.
    """

    projection_dim: int = 512
    vision_config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] | None = None

    def check(self) -> None:
        self.require(self.projection_dim > 0, f"projection_dim must be positive, not {self.projection_dim}")
        _ = self.vision

    @property
    def vision(self) -> CLIPVisionConfig:
        """The vision tower's own config."""
        return CLIPVisionConfig.from_dict(self.vision_config, "vision_config")


class SafetyScores(NamedTuple):
    """How far beyond its threshold each concept lies in each picture; above 0 it fires.

    Attributes:
        special: [B, 3] float32 on the CPU.
        concepts: [B, 17] float32 on the CPU, special care included.
    """

    special: Tensor
    concepts: Tensor


class StableDiffusionSafetyChecker(Model):
    """Tells which pictures show an unwanted concept; what then happens to them is the pipeline's matter.

    Args:
        config: the config, as an object or a dict; ``changes`` are single values that win over it.

    Raises:
        ConfigError: the config cannot be built.
    """

    config_class: ClassVar[type[SafetyCheckerConfig]] = SafetyCheckerConfig
    config: SafetyCheckerConfig

    def __init__(self, config: Mapping[str, Any] | None = None, **changes: Any) -> None:
        super().__init__(SafetyCheckerConfig.of(config, changes))
        vision, dim = self.config.vision, self.config.projection_dim
        # The tower's names carry a second vision_model in the checkpoints.
        self.vision_model = nn.ModuleDict({"vision_model": VisionTransformer(vision)})
        self.visual_projection = nn.Linear(vision.hidden_size, dim, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(CONCEPTS, dim), requires_grad=False)
        self.special_care_embeds = nn.Parameter(torch.ones(SPECIAL_CONCEPTS, dim), requires_grad=False)
        self.concept_embeds_weights = nn.Parameter(torch.ones(CONCEPTS), requires_grad=False)
        self.special_care_embeds_weights = nn.Parameter(torch.ones(SPECIAL_CONCEPTS), requires_grad=False)
        self.eval()

    def forward(self, clip_input: Tensor) -> list[bool]:
        """For each picture of [B, C, H, W], preprocessed for CLIP, whether any concept fires.

        Raises:
            InputError: the pictures do not have the size that the vision tower was made for.
        """
        return (self.scores(clip_input).concepts > 0).any(dim=1).tolist()

    @torch.no_grad()
    def scores(self, clip_input: Tensor) -> SafetyScores:
        """The numbers behind the verdict, rounded to three decimals as the published rule says."""
        image = self.visual_projection(self.vision_model["vision_model"](clip_input).pooler_output)
        special = _beyond(image, self.special_care_embeds, self.special_care_embeds_weights).round(decimals=3)
        care = SPECIAL_CARE * (special > 0).any(dim=1, keepdim=True)
        concepts = _beyond(image, self.concept_embeds, self.concept_embeds_weights) + care
        return SafetyScores(special, concepts.round(decimals=3))


def _beyond(image: Tensor, embeds: Tensor, thresholds: Tensor) -> Tensor:
    """Cosine similarities [B, K] of pictures [B, P] to concepts [K, P], less the thresholds; float32 on the CPU."""
    image, embeds, thresholds = (x.cpu().float() for x in (image, embeds, thresholds))
    return F.normalize(image) @ F.normalize(embeds).T - thresholds
