"""Tensors as images: Pillow's, arrays, or tensors in 0..1. The VAE's own images are [B, 3, H, W] in -1..1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from russet.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


def to_pil(x: torch.Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in -1..1 as Pillow images, each value rounded to the nearest of 256."""
    from PIL import Image

    rows = (_unit(x) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return [Image.fromarray(row) for row in rows.cpu().numpy()]


def _unit(x: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] in -1..1 as float32 in 0..1, clamped; on the CPU unless ``x`` is on CUDA.

    An image on CUDA is copied as bytes, a quarter of its size; a Mac has one memory.
    """
    x = x.detach() if x.is_cuda else x.detach().cpu()
    return (x.float() / 2 + 0.5).clamp(0, 1)


def as_output(x: torch.Tensor, output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
    """[B, 3, H, W] in -1..1 as a pipeline returns it.

    output_type: "pil"; "np", an array [B, H, W, 3] in 0..1; or "pt", a tensor [B, 3, H, W] in 0..1 on the CPU. Values
    outside are clamped.

    Raises:
        InputError: another output type.
    """
    if output_type == "pil":
        return to_pil(x)
    if output_type == "np":
        return _unit(x).cpu().permute(0, 2, 3, 1).numpy()
    if output_type == "pt":
        return _unit(x).cpu()
    raise InputError(f"output_type must be pil, np or pt, not {output_type!r}")
