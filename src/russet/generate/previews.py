"""Small pictures of what is being drawn, without the work of decoding: a linear map from latents to colours.

A latent of Stable Diffusion is nearly a linear function of the mean colour of the pixels that it stands for. The map is
found by least squares from patches of plain colours and what the pipeline's own VAE encodes them to, so no weights of
it are shipped, and any VAE has one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from russet.errors import ArgumentTypeError, InputError
from russet.generate import engine
from russet.images.conversion import to_pil
from russet.models.autoencoder import Autoencoder
from russet.models.tiny_vae import AutoencoderTiny
from russet.planning.plan import Plan

if TYPE_CHECKING:
    from PIL import Image

PICTURES, PATCHES, LATENTS = 4, 4, 4
"""The pictures of patches: how many, patches along a side, latents along the side of a patch."""


@dataclass(frozen=True)
class LinearMap:
    """From latents to colours. weight: [1 + Cz, 3], the constant first; float32, on the CPU."""

    weight: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """[B, Cz, h, w] as the VAE's encoder gives them → a picture [B, 3, h, w], about from -1 to 1."""
        weight = self.weight.to(z.device)
        colours: Tensor = torch.einsum("bchw,cd->bdhw", z.float(), weight[1:])
        return colours + weight[0].view(1, -1, 1, 1)


class Previewed(Protocol):
    """What a preview needs of a pipeline."""

    @property
    def device(self) -> torch.device: ...

    def known(self, name: str) -> Any: ...

    def plan(self) -> Plan: ...

    def on_device(self, component: str, plan: Plan) -> AbstractContextManager[Any]: ...


class Previews:
    """What a pipeline needs for previews: the map that was fitted to its VAE, once there is one."""

    def __init__(self) -> None:
        self._fitted: tuple[Autoencoder, LinearMap] | None = None

    def pictures(self, pipe: Previewed, latents: Tensor, vae: Autoencoder | None = None) -> list[Image.Image]:
        """What a pipeline's ``preview`` returns."""
        own: Autoencoder | None = pipe.known("vae")
        check(latents, pipe.known("unet").config.in_channels if own is None else own.config.latent_channels)
        latents = latents.float().masked_fill(~latents.isfinite(), 0.0)  # mps has nan_to_num from torch 2.0 on
        if vae is not None:
            return to_pil(engine.decode(vae, latents.to(vae.device), len(latents)))
        if own is None:
            raise InputError("this pipeline has no VAE, whose latents are to be shown: give one, preview(latents, vae)")
        if isinstance(own, AutoencoderTiny):
            with pipe.on_device("vae", pipe.plan()):
                return to_pil(engine.decode(own, latents.to(pipe.device), len(latents)))
        return to_pil(self._map(pipe, own)(engine.unscaled(own, latents)))

    def _map(self, pipe: Previewed, own: Autoencoder) -> LinearMap:
        if self._fitted is None or self._fitted[0] is not own:
            with pipe.on_device("vae", pipe.plan()):
                self._fitted = own, fitted(own, pipe.device)
        return self._fitted[1]


def check(latents: Tensor, channels: int) -> None:
    if not isinstance(latents, Tensor):
        raise ArgumentTypeError(f"latents must be a tensor, not {type(latents).__name__}")
    if latents.dim() != 4 or latents.shape[1] != channels or 0 in latents.shape:
        raise InputError(f"latents must have the shape [B, {channels}, h, w], not {list(latents.shape)}")


def fitted(vae: Autoencoder, device: torch.device) -> LinearMap:
    """The map that belongs to a VAE; encodes four pictures of 128×128 where a latent stands for 8 pixels."""
    side = PATCHES * LATENTS * vae.config.pixels_per_latent
    make = torch.Generator().manual_seed(0)
    shape = (PICTURES, vae.config.in_channels, PATCHES, PATCHES)
    colours = torch.rand(shape, generator=make, device="cpu") * 2 - 1
    pictures = F.interpolate(colours, size=(side, side), mode="nearest")
    z = encoded(vae, pictures.to(device, vae.dtype)).float().cpu()
    wanted = F.interpolate(colours, size=tuple(z.shape[2:]), mode="nearest")
    rows = torch.cat([torch.ones_like(z[:, :1]), z], dim=1)
    found = torch.linalg.lstsq(columns(rows), columns(wanted)).solution
    return LinearMap(found.float())


def encoded(vae: Autoencoder, x: Tensor) -> Tensor:
    """The most likely latents of pictures, not scaled."""
    output = vae.encode(x, return_dict=False)[0]
    latents: Tensor = output if isinstance(vae, AutoencoderTiny) else output.mode()
    return latents


def columns(x: Tensor) -> Tensor:
    """[B, C, h, w] → [B·h·w, C], float64."""
    return x.movedim(1, -1).reshape(-1, x.shape[1]).double()
