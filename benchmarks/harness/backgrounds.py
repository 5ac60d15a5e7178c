"""How well a picture follows its prompt, as the embedded model can be asked: the colour of a plain background."""

from __future__ import annotations

import torch
from torch import Tensor

COLOURS = {
    "red": (220, 50, 47),
    "green": (60, 160, 70),
    "blue": (50, 90, 210),
    "yellow": (245, 215, 60),
    "purple": (140, 70, 180),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}
"""What the words mean, of 255: one of seven is right by chance."""

PROMPTS = tuple(f"a photo of a cat on a {colour} background" for colour in COLOURS)


def right(pictures: Tensor) -> int:
    """How many of the pictures of ``PROMPTS``, [7, 3, H, W] in 0..1, have the colour asked for along their border."""
    wanted = torch.tensor(list(COLOURS.values())) / 255
    edges = (pictures[..., :8, :], pictures[..., -8:, :], pictures[..., :8], pictures[..., -8:])
    border = torch.cat([edge.flatten(2) for edge in edges], dim=2).median(dim=2).values
    return int((torch.cdist(border, wanted).argmin(dim=1) == torch.arange(len(COLOURS))).sum())
