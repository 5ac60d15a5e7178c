"""A picture worked on in overlapping tiles, so that memory does not grow with it, and put together without seams.

Each tile counts in proportion to the distance from its nearest edge within the picture: nothing at that edge, where it
lacks its neighbourhood, and most in its middle. Shares are made to add up to 1 everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from russet.errors import InputError


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut, in latents.

    Attributes:
        size: side of a tile.
        overlap: what neighbours share at least.

    Raises:
        InputError: sizes that cannot cover a picture with an overlap.
    """

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 < self.overlap < self.size:
            raise InputError(f"tiles of {self.size} latents cannot overlap by {self.overlap}; give 0 < overlap < tile")

    def fits(self, height: int, width: int) -> bool:
        """Whether one tile holds all of that many latents."""
        return max(height, width) <= self.size

    def starts(self, length: int) -> list[int]:
        """Where tiles begin along ``length`` latents: as few as cover it, evenly spaced."""
        if length <= self.size:
            return [0]
        steps = math.ceil((length - self.size) / (self.size - self.overlap))
        return [round(i * (length - self.size) / steps) for i in range(steps + 1)]


def tiled(process: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling, unit_in: int, unit_out: int) -> Tensor:
    """What ``process`` makes of ``x`` [B, C, H, W], a tile at a time.

    Args:
        process: from a tile to its result, whose sides have another scale but the same order.
        x: input, ``unit_in`` elements along a side to each latent.
        tiling: how to cut.
        unit_in: elements of the input along the side of a latent: 1 for latents, 8 for pixels.
        unit_out: the same of the result.
    """
    height, width = x.shape[2] // unit_in, x.shape[3] // unit_in
    total: Tensor | None = None
    for top, rows in _shares(height, tiling, unit_out, x.device):
        for left, columns in _shares(width, tiling, unit_out, x.device):
            source = x[:, :, _part(top, tiling, unit_in), _part(left, tiling, unit_in)]
            done = process(source).float()
            if total is None:  # float32, since many rounded parts are added up
                shape = *done.shape[:2], height * unit_out, width * unit_out
                total = torch.zeros(shape, dtype=torch.float32, device=x.device)
            total[:, :, _part(top, tiling, unit_out), _part(left, tiling, unit_out)] += done * rows[:, None] * columns
    assert total is not None, "a picture has at least one tile"
    return total.to(x.dtype)


def _part(start: int, tiling: Tiling, unit: int) -> slice:
    return slice(start * unit, (start + tiling.size) * unit)


def _shares(length: int, tiling: Tiling, unit: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Each tile's start along one side, and how much it counts at each of its elements, float32."""
    starts = tiling.starts(length)
    size = min(length, tiling.size) * unit
    place = torch.arange(size, dtype=torch.float32, device=device) + 0.5
    weights = []
    for i in range(len(starts)):
        before = place if i > 0 else torch.full_like(place, size)
        after = size - place if i < len(starts) - 1 else torch.full_like(place, size)
        weights.append(torch.minimum(before, after))
    total = torch.zeros(length * unit, device=device)
    for start, weight in zip(starts, weights, strict=True):
        total[start * unit : start * unit + size] += weight
    for start, weight in zip(starts, weights, strict=True):
        yield start, weight / total[start * unit : start * unit + size]
