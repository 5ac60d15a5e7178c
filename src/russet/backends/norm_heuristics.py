"""What of a norm depends on the size of its map: what computes goes by it, and what predicts memory.

A composed norm, in ``backends/layers.py``, has two ways: few operations and two float32 maps, or many and one.
The kernels of ``backends/triton/group_norm.py`` sum up a map in parts.
"""

from __future__ import annotations

AT_ONCE = 2**23  # numbers in a map; two float32 maps of so many are 64 MiB


def at_once(numbers: int) -> bool:
    """Whether a map of so many numbers is normalised in few operations."""
    return numbers <= AT_ONCE


PLACES, CHANNELS = 32, 64
"""Positions and channels of a map that one program of ``backends/triton/group_norm.py`` takes at a time."""

PROGRAMS = 2048
"""How many programs that sum up a map are enough for any GPU."""


def part(batch: int, channels: int, area: int) -> int:
    """Positions to a part of a map [B, C, h, w], of which each channel is summed up: 64 at least, of large maps 128."""
    least = min(4, max(2, area // 1024))
    return PLACES * max(least, area * batch * -(-channels // CHANNELS) // (PLACES * PROGRAMS))


def sums(batch: int, channels: int, area: int) -> int:
    """Bytes of all these sums: two float32 numbers for each channel of each part."""
    return 8 * batch * channels * -(-area // part(batch, channels, area))
