"""Noise for the solvers: independent draws, and increments of a Brownian path.

The path is a virtual Brownian tree (arXiv:2001.01328, section 4): its value anywhere is found by halving an interval
and drawing the middle given both ends, each draw seeded by its place in the tree. So the path depends on the seed
alone, not on the number of steps nor on their order, and nothing is stored.

Its clock is 1/sigma². From noise level a to b an ancestral step scales the noise by (b/a)² and adds a variance of
b²(a² - b²)/a² = b⁴(1/b² - 1/a²): on this clock the noise of one large step is exactly what its parts add up to.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from russet.errors import InputError

LEAVES = 2**24  # of the tree: a noise level is met within 2e-6 of itself
SPAN = 40.0  # log2 of the clock runs from -SPAN to SPAN


def draw(shape: Sequence[int], generators: Sequence[Generator], device: torch.device) -> Tensor:
    """Standard normal noise, float32, drawn where the generators are and moved to ``device``.

    generators: none (torch's global one on the CPU), one for the whole batch, or one per image.
    """
    if len(generators) > 1:
        one = (1, *shape[1:])
        return torch.cat([draw(one, [generator], device) for generator in generators])
    generator = generators[0] if generators else None
    where = generator.device if generator is not None else torch.device("cpu")
    return torch.randn(tuple(shape), generator=generator, device=where, dtype=torch.float32).to(device)


class Noise:
    """What a solver is given. draw: gives standard normal [B, C, h, w], float32."""

    def __init__(self, draw: Callable[[], Tensor]):
        self.draw = draw

    def __call__(self) -> Tensor:
        return self.draw()

    def path(self, seed: int | Sequence[int] | None = None) -> Callable[[float, float], Tensor]:
        """The increments of one Brownian path per image, each divided by its deviation: standard normal [B, C, h, w].

        The function returned takes two noise levels, from a down to b. seed: one for all images or one for each; None
        spends one draw on them, so that an image's path depends on its own stream only.
        """

        @functools.cache
        def begin() -> tuple[list[BrownianPath], torch.device]:
            first = self.draw()
            return [BrownianPath(one, first.shape[1:]) for one in seeds_of(seed, first)], first.device

        def between(a: float, b: float) -> Tensor:
            paths, device = begin()
            return torch.stack([path.between(a, b) for path in paths]).to(device)

        return between


def seeds_of(seed: int | Sequence[int] | None, first: Tensor) -> list[object]:
    """A seed for each image; without ``seed``, the bits of the first two values of its noise."""
    if seed is None:
        rows: list[list[int]] = first.flatten(1)[:, :2].float().cpu().contiguous().view(torch.int32).tolist()
        return [tuple(row) for row in rows]
    if isinstance(seed, int):
        return [(seed, image) for image in range(len(first))]
    if len(seed) != len(first):
        raise InputError(f"noise_sampler_seed has {len(seed)} seeds for {len(first)} images: give one for each")
    return list(seed)


class BrownianPath:
    """One Brownian path of tensors of one shape; standard deviation sqrt(c) after the time c on the clock."""

    def __init__(self, seed: object, shape: Sequence[int]):
        self.seed = seed
        self.shape = tuple(shape)
        self._recent: dict[int, Tensor] = {}  # the last few values: a step ends where the next one begins

    def between(self, a: float, b: float) -> Tensor:
        """(W(b) - W(a)) / its deviation, for noise levels a > b."""
        start, stop = leaf(a), leaf(b)
        return (self.at(stop) - self.at(start)) / math.sqrt(clock(stop) - clock(start))

    def at(self, place: int) -> Tensor:
        """W at a leaf of the tree, 0 .. LEAVES."""
        if place not in self._recent:
            self._recent = dict([*self._recent.items()][-3:])
            self._recent[place] = self._descend(place)
        return self._recent[place]

    def _descend(self, place: int) -> Tensor:
        low, high, node = 0, LEAVES, 1
        w_low = torch.zeros(self.shape)
        w_high = self._normal(0) * math.sqrt(clock(high) - clock(low))
        while place not in (low, high):
            middle = (low + high) // 2
            before, after = clock(middle) - clock(low), clock(high) - clock(middle)
            share = before / (before + after)
            w_middle = w_low + share * (w_high - w_low) + math.sqrt(share * after) * self._normal(node)
            if place < middle:
                high, w_high, node = middle, w_middle, 2 * node
            else:
                low, w_low, node = middle, w_middle, 2 * node + 1
        return w_low if place == low else w_high

    def _normal(self, node: int) -> Tensor:
        digest = hashlib.blake2b(repr((self.seed, node)).encode(), digest_size=8).digest()
        return torch.randn(self.shape, generator=Generator().manual_seed(int.from_bytes(digest, "little")))


def leaf(sigma: float) -> int:
    """The leaf that is nearest to a noise level; the clock 1/sigma² in even steps of its logarithm."""
    return round((-2 * math.log2(sigma) + SPAN) / (2 * SPAN) * LEAVES)


def clock(place: int) -> float:
    return float(2.0 ** (place / LEAVES * 2 * SPAN - SPAN))
