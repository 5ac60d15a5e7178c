"""The safety checker: pictures that it flags are returned black."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from russet import validation
from russet.errors import InputError
from russet.images.clip_processor import CLIPImageProcessor
from russet.images.conversion import to_pil
from russet.models.safety_checker import StableDiffusionSafetyChecker

log = logging.getLogger(__name__)

BLACK = -1.0

Filter = Callable[..., Any]
"""What Diffusers' users put in the safety checker's place: ``f(images=…, clip_input=…)`` → (images, flags).

images: pixels [B, 3, H, W] in [-1, 1]. clip_input: what the feature extractor makes of the pictures, or None without
one. flags: one bool per image, one for all, or None.
"""


def filtered(
    function: Filter, processor: CLIPImageProcessor | None, pixels: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[bool] | None]:
    """What ``checked`` returns, by a function of the user's. Pictures that it flags are black, whatever it returns.

    Raises:
        InputError: the function returned something else than images of the same shape and flags.
    """
    pixels = pixels.cpu()
    seen = None if processor is None else processor(to_pil(pixels)).pixel_values.to(dtype)
    answer = function(images=pixels, clip_input=seen)
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise InputError(f"a function as safety_checker must return (images, flags), not {validation.shown(answer)}")
    images, flags = answer
    images = validation.tensor("images from safety_checker", images, tuple(pixels.shape)).to(pixels)
    if flags is None:
        return images, None
    if isinstance(flags, bool):
        flags = [flags] * len(pixels)
    if len(flags) != len(pixels):
        raise InputError(f"safety_checker returned {len(flags)} flags for {len(pixels)} pictures: give one for each")
    return blackened(images, [bool(flag) for flag in flags])


def checked(
    checker: StableDiffusionSafetyChecker, processor: CLIPImageProcessor, pixels: Tensor
) -> tuple[Tensor, list[bool]]:
    """Pixels [B, 3, H, W] in [-1, 1] → the same on the CPU with flagged images black, and one flag per image."""
    pixels = pixels.cpu()
    seen = processor(to_pil(pixels)).pixel_values.to(device=checker.device, dtype=checker.dtype)
    flags = [bool(flag) for flag in checker(seen)]
    return blackened(pixels, flags)


def blackened(pixels: Tensor, flags: list[bool]) -> tuple[Tensor, list[bool]]:
    """The pictures, those that are flagged black, and the flags."""
    if any(flags):
        log.warning(
            "the safety checker flagged %d of %d pictures, which are returned black; "
            "try another prompt or seed, or load the pipeline with safety_checker=None",
            sum(flags),
            len(flags),
        )
    keep = torch.tensor(flags, device="cpu").logical_not().view(-1, 1, 1, 1)
    return torch.where(keep, pixels, torch.full_like(pixels, BLACK)), flags
