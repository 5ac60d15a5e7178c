"""Activation functions by the names that configs use.

They may overwrite their argument, which saves memory: give them only a tensor that nothing else holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from russet.backends.ops import gelu

Activation = Callable[[Tensor], Tensor]


def silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=True)


def relu(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


def mish(x: Tensor) -> Tensor:
    return F.mish(x, inplace=True)


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation x · sigmoid(1.702 x) that OpenAI's CLIP was trained with (arXiv:1606.08415, section 2)."""
    return torch.sigmoid(1.702 * x).mul_(x)


ACTIVATIONS: dict[str, Activation] = {
    "silu": silu,
    "swish": silu,
    "relu": relu,
    "mish": mish,
    "gelu": gelu,
    "quick_gelu": quick_gelu,
}
