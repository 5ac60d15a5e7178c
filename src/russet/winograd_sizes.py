"""How much work and memory 3×3 convolutions take in Winograd's way, by their sizes alone: see ``winograd.py``."""

from __future__ import annotations

import math

TILE = 4  # results along a side of a tile
REACH = 3  # weights along a side
PATCH = TILE + REACH - 1  # pixels along a side that a tile is made from
PLACES = PATCH * PATCH
WHOLE = 2**24  # numbers of transformed maps up to which all are made at once, and weights a part at a time
MAPS_AT_ONCE = 2**22  # numbers of the maps' part at a time otherwise: 16 MiB, which a processor's last cache holds
WEIGHTS_AT_ONCE = 2**24  # numbers of the weights' part at a time: transformed, they are four times as many
WORTH = 0.4  # share of the multiplications up to which the rest of the work (copies, small products) is made up for


def tiles(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tiles that cover results of that size."""
    return math.ceil(height / TILE), math.ceil(width / TILE)


def pays(batch: int, inputs: int, outputs: int, height: int, width: int) -> bool:
    """Whether a convolution of ``inputs`` to ``outputs`` channels with results [B, Cout, H, W] is faster in this way.

    Few channels do not make up for bringing tiles to and fro, nor few tiles for bringing the weights.
    """
    count = batch * math.prod(tiles(height, width))
    to_and_fro = count * PLACES * (PLACES * inputs + TILE * TILE * outputs)
    weights = PLACES * REACH * REACH * inputs * outputs
    products = count * PLACES * inputs * outputs
    direct = batch * height * width * REACH * REACH * inputs * outputs
    return products + to_and_fro + weights <= WORTH * direct


def parts(batch: int, inputs: int, outputs: int, height: int, width: int) -> tuple[int, int]:
    """How many rows of tiles, and how many filters, are worked on at a time: all of the ones, or of the others."""
    down, across = tiles(height, width)
    row = PLACES * inputs * batch * across  # numbers of a transformed row of tiles
    if row * down <= WHOLE:
        return down, max(1, min(outputs, WEIGHTS_AT_ONCE // (PLACES * inputs)))
    return max(1, min(down, MAPS_AT_ONCE // row)), outputs


def scratch(batch: int, inputs: int, outputs: int, height: int, width: int) -> int:
    """Numbers at the widest moment, beside the map and the results."""
    down, across = tiles(height, width)
    rows, some = parts(batch, inputs, outputs, height, width)
    count = batch * rows * across
    framed = batch * inputs * (rows * TILE + 2) * (across * TILE + 2)
    given, weights = PLACES * inputs * count, PLACES * inputs * some
    products = (PLACES + TILE * TILE) * some * count
    arriving = framed + PLACES * inputs * count if rows < down else 0
    return max(framed + 2 * given, weights + given + max(products, arriving))
