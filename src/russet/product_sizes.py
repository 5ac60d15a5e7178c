"""From which sizes on matrix products do more than multiply: what computes goes by it, and what predicts memory.

Products that gate what they make are in ``products_triton.py``, those that take a sum in in ``models/sums.py``.
"""

from __future__ import annotations

TILE, WIDTH, DEPTH = 128, 64, 64
"""Tokens and features of a tile of a gated product, and the features that are multiplied at a time."""

TILES = 300
"""Tiles from which on a gated product is the quicker way: more than a GPU works on at once, two to a multiprocessor."""

ONES = 8  # columns beside the tokens, the first of them ones: so many numbers keep rows at multiples of 16 bytes
REPEATED = 5 * 2**20  # bytes up to which a shortcut's weights for all rows are worth an operation a call
PADDED = 2**20  # bytes of a layer's joined weights up to which a padded copy of them is worth an operation a call


def gating_pays(tokens: int, inputs: int, outputs: int) -> bool:
    """Whether a gated product is made for its sizes, and quicker: whole tiles of weights, and enough of all."""
    whole = inputs % DEPTH == 0 and outputs % WIDTH == 0
    return whole and -(-tokens // TILE) * outputs // WIDTH >= TILES
