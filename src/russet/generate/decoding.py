"""Between pictures and latents: the VAE as a plan wants it, in more precise arithmetic where values overflow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from russet.generate import engine, safety
from russet.generate.overflow import fallbacks, is_finite, is_picture
from russet.generate.sampling import AtWork
from russet.models.autoencoder import Autoencoder
from russet.planning.plan import Plan
from russet.residency import placement


def decode(vae: Autoencoder, latents: Tensor, plan: Plan, at_work: AtWork) -> Tensor:
    """Latents [B, C, h, w] → pixels [B, 3, H, W] in -1..1."""
    with at_work("vae", plan), placement.tiled(vae, plan.vae_tile):
        return engine.decode(vae, latents, plan.vae_batch)


def decode_finite(vae: Autoencoder, latents: Tensor, plan: Plan, at_work: AtWork) -> tuple[Tensor, list[str]]:
    """The same; pixels that are not finite or all black are made again more precisely. Also returns notes."""
    notes: list[str] = []
    left = fallbacks("vae", plan)
    while not is_picture(pixels := decode(vae, latents, plan, at_work)):
        if not left:
            break
        fallback = left.pop(0)
        notes.append(fallback.announce())
        plan = fallback.plan
    if not is_finite(pixels):
        notes.append("the picture is not finite even in float32: its latents or the VAE's weights must be damaged")
        pixels = torch.nan_to_num(pixels.cpu(), nan=-1.0)  # which mps has from torch 2.0 on
    return pixels, notes


def encode(
    vae: Autoencoder, pictures: Tensor, generators: tuple[Generator, ...], plan: Plan, at_work: AtWork
) -> tuple[Tensor, list[str]]:
    """Pictures [B, 3, H, W] in -1..1 → the denoiser's latents [B, C, h, w], float32, and notes.

    generators: what the latents are sampled with from the distribution that the VAE gives: one for the batch, one per
    picture, or none. Latents that are not finite are made again more precisely.
    """
    notes: list[str] = []
    left = fallbacks("vae", plan)
    states = [generator.get_state() for generator in generators]
    while not is_finite(latents := encode_once(vae, pictures, generators, plan, at_work)) and left:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        fallback = left.pop(0)
        notes.append(fallback.announce())
        plan = fallback.plan
    return latents, notes


def encode_once(
    vae: Autoencoder, pictures: Tensor, generators: tuple[Generator, ...], plan: Plan, at_work: AtWork
) -> Tensor:
    with at_work("vae", plan), placement.tiled(vae, plan.vae_tile):
        return engine.encode(vae, pictures, generators, plan.vae_batch)


def check(checker: Any, processor: Any, pixels: Tensor, plan: Plan, at_work: AtWork) -> tuple[Tensor, list[bool]]:
    """What the safety checker leaves of the pictures, and its flags."""
    with at_work("safety_checker", plan):
        return safety.checked(checker, processor, pixels)
