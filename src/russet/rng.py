"""Noise from random number generators: independent draws, and increments of a Brownian path.

Noise of a seed is drawn in float32 on the CPU, then moved, so that a seed gives the same image on every device and in
every precision. Noise of the caller's generators is drawn on their device in the precision of the model, as in
Diffusers: on some devices the numbers in half precision are not those in float32, rounded. With one generator per image
(``seed=`` or a list of generators) an image does not depend on its batch. A single generator draws for the whole batch
at once, in Diffusers' order. The order of draws, first the starting noise and then the solver's noise step by step, is
public behaviour.

A Brownian path is a virtual tree (arXiv:2001.01328, section 4): its value anywhere is found by halving an interval
and drawing the middle given both ends, each draw seeded by its node of the tree. So the path depends on the seed
alone, not on the number of steps nor on their order, and nothing is stored.

Its time is 1/sigma². From noise level a to b an ancestral step scales the noise by (b/a)² and adds a variance of
b²(a² - b²)/a² = b⁴(1/b² - 1/a²): in this time the noise of one large step is the sum of that of its parts.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from russet.errors import InputError

Seeds = int | Sequence[int] | None

LEAVES = 2**20  # of the tree: a hundredth of a step where a run has 1000
SPAN = 40.0  # log2 of the clock runs from -SPAN to SPAN


def draw(
    shape: Sequence[int], generators: Sequence[Generator], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise, float32, drawn in ``dtype`` on the generators' device and moved to ``device``.

    generators: none (torch's global one on the CPU), one for the whole batch, or one per image.
    """
    if len(generators) > 1:
        one = (1, *shape[1:])
        return torch.cat([draw(one, [generator], device, dtype) for generator in generators])
    generator = generators[0] if generators else None
    where = generator.device if generator is not None else torch.device("cpu")
    return torch.randn(tuple(shape), generator=generator, device=where, dtype=dtype).to(device, torch.float32)


@dataclass(frozen=True)
class NoiseSource:
    """Draws noise of the latents' shape, in a precision.

    generators: one for the batch, one per image, or none (torch's global one).
    """

    generators: tuple[Generator, ...]
    shape: tuple[int, int, int, int]
    device: torch.device
    dtype: torch.dtype = torch.float32

    def __call__(self) -> Tensor:
        """[B, C, h, w] of standard normal noise, float32, on the device."""
        return draw(self.shape, self.generators, self.device, self.dtype)

    def state(self) -> list[Tensor]:
        """The state of each generator, for ``restore``."""
        return [generator.get_state() for generator in self._streams]

    def restore(self, state: Sequence[Tensor]) -> None:
        """Sets the generators back to an earlier state."""
        for generator, one in zip(self._streams, state, strict=True):
            generator.set_state(one)

    @property
    def _streams(self) -> tuple[Generator, ...]:
        return self.generators or (torch.default_generator,)


def generators_of(seeds: Sequence[int]) -> tuple[Generator, ...]:
    """A CPU generator for each image."""
    return tuple(Generator().manual_seed(seed) for seed in seeds)


class Noise:
    """The noise of a solver. draw: returns standard normal [B, C, h, w], float32."""

    def __init__(self, draw: Callable[[], Tensor]):
        self.draw = draw

    def __call__(self) -> Tensor:
        return self.draw()

    def path(self, seed: Seeds = None) -> Callable[[float, float], Tensor]:
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


def seeds_of(seed: Seeds, first: Tensor) -> list[object]:
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
    """One Brownian path of tensors of one shape; its deviation is the square root of the time on the clock."""

    def __init__(self, seed: object, shape: Sequence[int]):
        self.seed = seed
        self.shape = tuple(shape)
        self._recent: dict[float, Tensor] = {}  # the last few values: a step ends where the next one begins

    def between(self, a: float, b: float) -> Tensor:
        """(W(b) - W(a)) / its deviation, for noise levels a > b."""
        return (self.at(b) - self.at(a)) / math.sqrt(b**-2 - a**-2)

    def at(self, sigma: float) -> Tensor:
        """W at a noise level; it begins at 0 where there is nothing but noise."""
        if sigma not in self._recent:
            self._recent = dict([*self._recent.items()][-3:])
            self._recent[sigma] = self._descend(sigma)
        return self._recent[sigma]

    def _descend(self, sigma: float) -> Tensor:
        place = (SPAN - 2 * math.log2(sigma)) / (2 * SPAN) * LEAVES
        low, high, node = 0, LEAVES, 1
        w_low = torch.zeros(self.shape, device="cpu")
        w_high = self._normal(0) * math.sqrt(clock(high) - clock(low))
        while high - low > 1:
            middle = (low + high) // 2
            before, after = clock(middle) - clock(low), clock(high) - clock(middle)
            share = before / (before + after)
            w_middle = w_low + share * (w_high - w_low) + math.sqrt(share * after) * self._normal(node)
            if place < middle:
                high, w_high, node = middle, w_middle, 2 * node
            else:
                low, w_low, node = middle, w_middle, 2 * node + 1
        # straight within a leaf, so that float32 rounding of sigma does not jump to another value
        return w_low + (sigma**-2 - clock(low)) / (clock(high) - clock(low)) * (w_high - w_low)

    def _normal(self, node: int) -> Tensor:
        digest = hashlib.blake2b(repr((self.seed, node)).encode(), digest_size=8).digest()
        stream = Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
        return torch.randn(self.shape, generator=stream, device="cpu")


def clock(leaf: int) -> float:
    """1/sigma² at the start of a leaf; the leaves are even in its logarithm."""
    return float(2.0 ** (leaf / LEAVES * 2 * SPAN - SPAN))
