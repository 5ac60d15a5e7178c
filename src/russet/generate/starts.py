"""What the latents begin as, before the first denoising step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from russet import validation
from russet.families.family import Geometry
from russet.rng import NoiseSource
from russet.schedulers.schedule import Schedule

Encode = Callable[[Tensor, "tuple[Generator, ...]"], Tensor]
"""Pictures [B, 3, H, W] in -1..1, and the generators to sample with → the denoiser's latents [B, C, h, w]."""


class Start(ABC):
    """What a run starts from."""

    encodes: ClassVar[bool] = False
    """Whether pictures go through the VAE's encoder."""

    def size(self, factor: int) -> tuple[int, int] | None:
        """The height and width in pixels that the start has, or None where it has none of its own."""
        return None

    @abstractmethod
    def check(self, shape: tuple[int, int, int, int], geometry: Geometry) -> None:
        """Raises InputError unless this can be the start of latents of that shape, [B, C, h, w]."""

    def rest_of(self, schedule: Schedule) -> Schedule:
        """The part of a schedule that is left to do."""
        return schedule

    @abstractmethod
    def latents(self, schedule: Schedule, noise: NoiseSource, encode: Encode) -> Tensor:
        """Latents at the schedule's first point, in the scheduler's public convention, float32, on the device."""


@dataclass(frozen=True, kw_only=True)
class NoiseStart(Start):
    """Text to image: noise. given: the noise itself, [B, C, h, w], standard normal; left out, it is drawn."""

    given: Tensor | None = None

    def check(self, shape: tuple[int, int, int, int], geometry: Geometry) -> None:
        if self.given is not None:
            validation.tensor("latents", self.given, shape)

    def latents(self, schedule: Schedule, noise: NoiseSource, encode: Encode) -> Tensor:
        start = noise() if self.given is None else self.given.to(noise.device, torch.float32)
        return start * schedule.init_noise_sigma
