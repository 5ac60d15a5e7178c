"""How much work and memory 3×3 convolutions take in Winograd's way, by their sizes alone: see ``winograd.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Room:
    """Numbers that the parts of one convolution take, those of one band of rows at a time.

    ``framed`` maps are cut into ``patches``, which become ``given``; these times ``weights`` are ``products``, which
    become ``made`` results.
    """

    framed: int
    patches: int
    given: int
    weights: int
    products: int
    made: int
    whole: bool  # all rows are one band, so that maps are done with before weights are begun with

    @property
    def before(self) -> int:
        """Where maps and patches begin: in place of the weights or after them."""
        return self.given if self.whole else self.given + self.weights

    @property
    def size(self) -> int:
        after = self.given + self.weights + self.products + self.made
        return max(self.before + self.framed + self.patches, after)


def room(batch: int, inputs: int, outputs: int, height: int, width: int, *, doubled: bool = False) -> Room:
    """What a convolution takes beside its map and its results."""
    down, across = tiles(height, width)
    rows, some = parts(batch, inputs, outputs, height, width)
    count, (step, size) = batch * rows * across, steps(doubled)
    return Room(
        framed=batch * inputs * ((rows - 1) * step + size) * ((across - 1) * step + size),
        patches=size * size * inputs * count,
        given=PLACES * inputs * count,
        weights=PLACES * inputs * some,
        products=PLACES * some * count,
        made=TILE * TILE * some * count,
        whole=rows == down,
    )


def steps(doubled: bool) -> tuple[int, int]:
    """Pixels from one tile's patch to the next, and along a side of a patch, in a map that is to be doubled or not."""
    return (TILE // 2, PATCH // 2 + 1) if doubled else (TILE, PATCH)
