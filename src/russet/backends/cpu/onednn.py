"""Linear layers by oneDNN, the library that PyTorch's CPU convolutions use, where PyTorch itself takes another's.

On x86 PyTorch hands float32 products to MKL, which on AMD's processors is the slower of the two: on a Zen 4, one
thread, torch 2.13, 82 to 99 GFLOP/s in the linear layers of Stable Diffusion 1.5 against 105 to 110.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HAS_LINEAR = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # from torch 2.0 on


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN's operation is for these: float32 on the CPU, and no gradient wanted, for which it has no rule."""
    wanted = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, weight, bias))
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not wanted


class PrepackedWeight:
    """A layer's weight in bfloat16 in the order in which oneDNN multiplies it, chosen for the sizes of its first call.

    Right for other sizes too, for which oneDNN may reorder it in the call.
    """

    def __init__(self) -> None:
        self._packed: Tensor | None = None

    def takes(self, x: Tensor, weight: Tensor) -> bool:
        """Whether it is for this call: bfloat16 on the CPU, and no gradient wanted."""
        fits = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu"
        return HAS_LINEAR and fits and not torch.is_grad_enabled()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._packed is None:
            rows = x.numel() // x.shape[-1]
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return product

    def convolution(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """A convolution whose padding is numbers of zeros."""
        sizes = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *sizes, list(x.shape))
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(x, self._packed, conv.bias, *sizes, "none", [], "")
        return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, prepacked: PrepackedWeight | None = None) -> Tensor:
    """``F.linear``: ``x`` [..., Cin] times ``weight`` [Cout, Cin], plus ``bias`` [Cout]."""
    if prepacked is not None and prepacked.takes(x, weight):
        return prepacked.linear(x, weight, bias)
    if not (HAS_LINEAR and takes(x, weight, bias)):
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
