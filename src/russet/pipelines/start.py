"""Where denoising starts, and where its noise comes from.

Noise is float32 and drawn on the CPU, then moved, so that a seed means the same picture on every device. With one
stream per image (``seed=`` or a list of generators) a picture does not depend on the batch it is made in. A single
generator is drawn from for the whole batch at once, which is the order that Diffusers draws in. The order of draws,
first the starting noise and then the solver's noise step by step, is public behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from russet.schedulers.brownian import draw


@dataclass(frozen=True)
class NoiseSource:
    """Draws noise of the latents' shape. generators: one for the batch, one per image, or none (torch's global one)."""

    generators: tuple[Generator, ...]
    shape: tuple[int, int, int, int]
    device: torch.device

    def __call__(self) -> Tensor:
        """[B, C, h, w] of standard normal noise, float32, on the device."""
        return draw(self.shape, self.generators, self.device)

    def state(self) -> list[Tensor]:
        """Where each stream stands, for ``restore``."""
        return [generator.get_state() for generator in self.streams]

    def restore(self, state: Sequence[Tensor]) -> None:
        """Sets every stream back to where it stood."""
        for generator, one in zip(self.streams, state, strict=True):
            generator.set_state(one)

    @property
    def streams(self) -> tuple[Generator, ...]:
        return self.generators or (torch.default_generator,)


def generators_of(seeds: Sequence[int]) -> tuple[Generator, ...]:
    """One CPU stream per image."""
    return tuple(Generator().manual_seed(seed) for seed in seeds)
