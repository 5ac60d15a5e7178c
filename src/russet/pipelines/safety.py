"""The safety checker: pictures that it flags are returned black."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from russet.image_processor import CLIPImageProcessor
from russet.images import to_pil
from russet.models.safety_checker import StableDiffusionSafetyChecker

log = logging.getLogger(__name__)

BLACK = -1.0


def checked(
    checker: StableDiffusionSafetyChecker, processor: CLIPImageProcessor, pixels: Tensor
) -> tuple[Tensor, list[bool]]:
    """Pixels [B, 3, H, W] in [-1, 1] → the same on the CPU with flagged images black, and one flag per image."""
    pixels = pixels.cpu()
    seen = processor(to_pil(pixels)).pixel_values.to(device=checker.device, dtype=checker.dtype)
    flags = [bool(flag) for flag in checker(seen)]
    if any(flags):
        log.warning(
            "the safety checker flagged %d of %d pictures, which are returned black; "
            "try another prompt or seed, or load the pipeline with safety_checker=None",
            sum(flags),
            len(flags),
        )
    keep = torch.tensor(flags, device="cpu").logical_not().view(-1, 1, 1, 1)
    return torch.where(keep, pixels, torch.full_like(pixels, BLACK)), flags
