"""Pictures as callers give them, as tensors: Pillow images of every mode, arrays, tensors, and lists of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from russet import validation
from russet.errors import ArgumentTypeError, InputError

if TYPE_CHECKING:
    from PIL import Image


def read_pictures(name: str, value: Any, *, multiple: int, latent_channels: int | None = None) -> Tensor:
    """Pictures as [B, 3, H, W] float32 in -1..1, H and W multiples of ``multiple``.

    Pillow images: EXIF orientation is applied, and every mode becomes RGB; all are resized (Lanczos) to the size of the
    first one, cut down to a multiple. Arrays [H, W, C] or [B, H, W, C] and tensors [C, H, W] or [B, C, H, W] are in
    0..1, or bytes in 0..255, or in -1..1 if any value is below 0; they are resized to the nearest pixel.

    A tensor with ``latent_channels`` channels is latents: it is returned as it is, float32.

    Raises:
        ArgumentTypeError: something that is no picture.
        InputError: an empty list, values that are not finite, pictures of several sizes or kinds, or too small ones.
    """
    from PIL import Image

    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise InputError(f"{name} is an empty list: give at least one picture")
    if all(isinstance(item, Image.Image) for item in items):
        return from_images(name, items, multiple)
    if all(isinstance(item, np.ndarray) for item in items):
        batch = torch.cat([from_array(name, item) for item in items]) if same(name, items) else torch.empty(0)
    elif all(isinstance(item, Tensor) for item in items):
        same(name, items)
        batch = torch.cat([item if item.dim() == 4 else item[None] for item in items])
    else:
        came = validation.shown(value)
        raise ArgumentTypeError(
            f"{name} must be a Pillow image, a NumPy array, a tensor, or a list of one kind, not {came}"
        )
    return from_batch(name, batch, multiple, latent_channels)


def same(name: str, items: Sequence[Any]) -> bool:
    """Raises InputError unless all arrays or tensors have one shape of 3 or 4 dimensions (2 for gray arrays)."""
    shapes = {tuple(item.shape[-3:]) for item in items}
    least = 2 if isinstance(items[0], np.ndarray) else 3
    if len(shapes) != 1 or any(not least <= item.ndim <= 4 for item in items) or 0 in next(iter(shapes)):
        raise InputError(
            f"{name}: arrays must be [H, W, C] or [B, H, W, C], tensors [C, H, W] or [B, C, H, W], and all of one "
            f"size; their shapes are {[list(item.shape) for item in items]}"
        )
    return True


def from_images(name: str, images: Sequence[Image.Image], multiple: int) -> Tensor:
    from PIL import Image, ImageOps

    images = [as_rgb(ImageOps.exif_transpose(image) or image) for image in images]
    width, height = fitting(name, images[0].size, multiple)
    images = [
        image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
        for image in images
    ]
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 255
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() * 2 - 1


def as_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB. Transparency is left out; 16-bit grays lose their lower half."""
    from PIL import Image

    if image.mode.startswith("I"):  # which Pillow would clip at 255
        values = np.asarray(image, dtype=np.int64)
        image = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def from_array(name: str, array: np.ndarray) -> Tensor:
    """[H, W], [H, W, C] or [B, H, W, C] → [B, C, H, W]."""
    if array.dtype.kind not in "fu" or (array.dtype.kind == "u" and array.dtype != np.uint8):
        raise ArgumentTypeError(f"{name} must hold floating-point numbers or bytes, not {array.dtype}")
    array = array[..., None] if array.ndim == 2 else array
    array = array[None] if array.ndim == 3 else array
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def from_batch(name: str, batch: Tensor, multiple: int, latent_channels: int | None) -> Tensor:
    if not (batch.is_floating_point() or batch.dtype == torch.uint8):
        raise ArgumentTypeError(f"{name} must hold floating-point numbers or bytes, not {batch.dtype}")
    if not bool(torch.isfinite(batch).all()):
        raise InputError(f"{name} holds values that are not finite (NaN or infinity)")
    x = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
    if x.shape[1] == latent_channels:
        return x
    if x.shape[1] not in (1, 3):
        raise InputError(f"{name} must have 3 channels, or 1 for grays, not {x.shape[1]}")
    width, height = fitting(name, (x.shape[3], x.shape[2]), multiple)
    if (height, width) != tuple(x.shape[2:]):
        x = F.interpolate(x, size=(height, width))
    x = x.expand(-1, 3, -1, -1)
    return x if float(x.min()) < 0 else x * 2 - 1


def fitting(name: str, size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Width and height cut down to multiples."""
    width, height = (side - side % multiple for side in size)
    if width < multiple or height < multiple:
        raise InputError(f"{name} is {size[0]}×{size[1]} pixels: it must be at least {multiple}×{multiple}")
    return width, height
