"""What the latents begin as, before the first denoising step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from russet import validation
from russet.errors import InputError
from russet.families.family import Geometry
from russet.images.inputs import read_pictures
from russet.rng import NoiseSource
from russet.schedulers.schedule import Schedule

Encode = Callable[[Tensor, "tuple[Generator, ...]"], Tensor]
"""Pictures [B, 3, H, W] in -1..1, and the generators to sample with → the denoiser's latents [B, C, h, w]."""


class Start(ABC):
    """What a run starts from."""

    encodes: ClassVar[bool] = False
    """Whether pictures go through the VAE's encoder."""

    def size(self, geometry: Geometry) -> tuple[int, int] | None:
        """The height and width in pixels that the start has, or None where it has none of its own."""
        return None

    @abstractmethod
    def check(self, shape: tuple[int, int, int, int], geometry: Geometry) -> None:
        """Raises InputError unless this can be the start of latents of that shape, [B, C, h, w]."""

    def rest_of(self, schedule: Schedule) -> Schedule:
        """The part of a schedule that is left to do."""
        return schedule

    @abstractmethod
    def latents(self, schedule: Schedule, noise: NoiseSource, geometry: Geometry, encode: Encode) -> Tensor:
        """Latents at the schedule's first point, in the scheduler's public convention, float32, on the device."""


@dataclass(frozen=True, kw_only=True)
class NoiseStart(Start):
    """Text to image: noise. given: the noise itself, [B, C, h, w], standard normal; left out, it is drawn."""

    given: Tensor | None = None

    def check(self, shape: tuple[int, int, int, int], geometry: Geometry) -> None:
        if self.given is not None:
            validation.tensor("latents", self.given, shape)

    def latents(self, schedule: Schedule, noise: NoiseSource, geometry: Geometry, encode: Encode) -> Tensor:
        start = noise() if self.given is None else self.given.to(noise.device, torch.float32)
        return start * schedule.init_noise_sigma


@dataclass(frozen=True, kw_only=True)
class ImageStart(Start):
    """Image to image: pictures with noise added, from which only the last part of the schedule is made.

    image: what ``images.inputs.read_pictures`` takes, or the latents of pictures, [B, C, h, w].
    strength: 0..1, the part of the steps that is made: int(steps · strength) of them, as in Diffusers. 1 makes all.
    """

    image: Any = None
    strength: float = 0.8
    encodes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.image is None:
            raise InputError("image is missing: give the picture to start from")
        validation.number("strength", self.strength, least=0.0, most=1.0)

    def size(self, geometry: Geometry) -> tuple[int, int]:
        height, width = self._read(geometry).shape[2:]
        return (height * geometry.factor, width * geometry.factor) if self._is_latents(geometry) else (height, width)

    def check(self, shape: tuple[int, int, int, int], geometry: Geometry) -> None:
        pictures = self._read(geometry)
        if not geometry.decodes and not self._is_latents(geometry):
            raise InputError("this pipeline has no VAE, which makes latents of pictures: give latents as image")
        if shape[0] % len(pictures):
            raise InputError(
                f"image has {len(pictures)} pictures for a batch of {shape[0]}: give one, or one for each prompt"
            )

    def rest_of(self, schedule: Schedule) -> Schedule:
        steps = len(schedule.points)
        first = steps - min(int(steps * self.strength), steps)
        if first == steps:
            raise InputError(
                f"strength {self.strength:g} leaves none of {steps} steps to make: it must be at least {1 / steps:.3g}"
            )
        return schedule.start_at(first)

    def latents(self, schedule: Schedule, noise: NoiseSource, geometry: Geometry, encode: Encode) -> Tensor:
        pictures, images = self._read(geometry), noise.shape[0]
        if self._is_latents(geometry):
            x0 = pictures.to(noise.device)
        else:
            if len(noise.generators) > 1:  # each picture of the batch is sampled with its own generator
                pictures = pictures.repeat(images // len(pictures), 1, 1, 1)
            x0 = encode(pictures, noise.generators)
        # Tiled and not repeated, as in Diffusers: of [a, b] for four images come [a, b, a, b].
        return schedule.add_noise(x0.repeat(images // len(x0), 1, 1, 1), noise())

    def _read(self, geometry: Geometry) -> Tensor:
        if "_pictures" not in self.__dict__:
            read = read_pictures("image", self.image, multiple=geometry.factor, latent_channels=geometry.channels)
            object.__setattr__(self, "_pictures", read)
        pictures: Tensor = self.__dict__["_pictures"]
        return pictures

    def _is_latents(self, geometry: Geometry) -> bool:
        return self._read(geometry).shape[1] == geometry.channels
