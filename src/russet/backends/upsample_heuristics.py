"""From which sizes on a doubled map's convolution is a transposed one: see ``backends/triton/upsample.py``."""

from __future__ import annotations

WORTH = 512
"""Positions of the small map, in all rows, from which on the transposed convolution is the quicker way.

What it saves and what its weights cost both grow with the channels, inputs times outputs: positions alone decide. For
1280 channels 96 instead of 112 µs for 512 of them, but 66 instead of 41 for 128 (H100, float16, weights made).
"""

SIDE = 4  # weights along a side of the transposed convolution's kernel


def pays(batch: int, inputs: int, outputs: int, height: int, width: int) -> bool:
    """Whether the way is taken for maps [B, Cin, h, w] before doubling: enough positions, and all in 32-bit places."""
    positions = batch * height * width
    largest = max(positions * inputs, 4 * positions * outputs, SIDE * SIDE * inputs * outputs)
    return positions >= WORTH and largest < 2**31


def room(inputs: int, outputs: int) -> int:
    """Numbers that it takes beside its map and its result: its weights."""
    return SIDE * SIDE * inputs * outputs
