"""From which sizes on matrix products do more than multiply: what computes goes by it, and what predicts memory.

Products that gate what they make are in ``backends/triton/geglu.py``, those that add to a sum
in ``passes/residual_fusion.py``.
"""

from __future__ import annotations

TILE, WIDTH, DEPTH = 128, 64, 64
"""Tokens and features of a tile of a gated product, and the features that are multiplied at a time."""

ONES = 8  # columns beside the tokens, the first of them ones: so many numbers keep rows at multiples of 16 bytes
REPEATED = 5 * 2**20  # bytes up to which a shortcut's weights for all rows are worth an operation a call
PADDED = 2**20  # bytes of a layer's joined weights up to which a padded copy of them is worth an operation a call


def gates(inputs: int, outputs: int) -> bool:
    """Whether a product of such a layer gates what it makes: the kernel is made for whole tiles of weights."""
    return inputs % DEPTH == 0 and outputs % WIDTH == 0
