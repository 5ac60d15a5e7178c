"""Between pictures and latents: the VAE as a plan wants it, in more precise arithmetic where values overflow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from russet.generate import engine, safety
from russet.generate.overflow import fallbacks, is_finite, is_picture
from russet.generate.sampling import BringToDevice
from russet.models.autoencoder import Autoencoder


def decode(vae: Autoencoder, latents: Tensor, at_once: int, on_device: BringToDevice) -> tuple[Tensor, list[str]]:
    """Latents [B, C, h, w] → pixels [B, 3, H, W] in -1..1, ``at_once`` in a call, and notes.

    Pixels that are not finite or all black are made again more precisely.
    """
    notes: list[str] = []
    left, precision = fallbacks("vae", vae), None
    while True:
        with on_device("vae", precision):
            pixels = engine.decode(vae, latents, at_once)
        if is_picture(pixels):
            return pixels, notes
        if not left:
            break
        fallback = left.pop(0)
        notes.append(fallback.announce())
        precision = fallback.precision
    if not is_finite(pixels):
        notes.append("the picture is not finite even in float32: its latents or the VAE's weights must be damaged")
        pixels = torch.nan_to_num(pixels.cpu(), nan=-1.0)  # which mps has from torch 2.0 on
    return pixels, notes


def encode(
    vae: Autoencoder,
    pictures: Tensor,
    generators: tuple[Generator, ...],
    at_once: int,
    on_device: BringToDevice,
    *,
    in_float32: bool,
) -> tuple[Tensor, list[str]]:
    """Pictures [B, 3, H, W] in -1..1 → the denoiser's latents [B, C, h, w], float32, and notes.

    generators: what the latents are sampled with from the distribution that the VAE gives: one for the batch, one per
    picture, or none. in_float32: whether they draw in float32, and not in the VAE's precision, as Diffusers does.
    Latents that are not finite are made again more precisely.
    """
    notes: list[str] = []
    left, precision = fallbacks("vae", vae), None
    states = [generator.get_state() for generator in generators]
    while True:
        with on_device("vae", precision):
            latents = engine.encode(vae, pictures, generators, at_once, in_float32=in_float32)
        if is_finite(latents) or not left:
            return latents, notes
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        fallback = left.pop(0)
        notes.append(fallback.announce())
        precision = fallback.precision


def check(
    checker: Any, processor: Any, pixels: Tensor, dtype: torch.dtype, on_device: BringToDevice
) -> tuple[Tensor, list[bool] | None]:
    """Pixels [B, 3, H, W] as they may be shown, and one flag per picture; None where nothing looked at them.

    checker: a network, a function of the user's, or None. dtype: of what a function is given.
    """
    if checker is None:
        return pixels, None
    if not isinstance(checker, nn.Module):
        return safety.filtered(checker, processor, pixels, dtype)
    if processor is None:
        return pixels, None
    with on_device("safety_checker", None):
        return safety.checked(checker, processor, pixels)  # type: ignore[arg-type]  # one of ours, or compiled
