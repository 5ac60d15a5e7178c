"""Up to which size a composed norm takes the quick way: what computes goes by it, and what predicts memory.

Both ways are in ``models/norms.py``: few operations and two float32 maps, or many operations and one.
"""

from __future__ import annotations

AT_ONCE = 2**23  # numbers in a map; two float32 maps of so many are 64 MiB


def at_once(numbers: int) -> bool:
    """Whether a map of so many numbers is normalised in few operations."""
    return numbers <= AT_ONCE
