"""Convolutions on a CPU: with fewer multiplications, or as products by the faster library."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from russet.backends.blocks.resnet import OptimizedUpsample
from russet.backends.cpu import onednn, winograd, winograd_heuristics

FEW_POSITIONS = 128  # in all rows; and channels at least


class CpuConv2d(nn.Conv2d):
    """``nn.Conv2d`` in the ways that passes have switched on, where they are faster.

    In float32, by_winograd: 3×3 with fewer multiplications; by_onednn: 1×1, and 3×3 at few positions, as products by
    oneDNN. In bfloat16, prepacked: the weight as oneDNN multiplies it.
    """

    prepacked: onednn.PrepackedWeight | None = None

    by_winograd: bool = False
    by_onednn: bool = False

    def forward(self, input: Tensor) -> Tensor:
        if self.prepacked is not None and self.prepacked.takes(input, self.weight) and self._pads_numbers_of_zeros:
            return self.prepacked.convolution(input, self)
        if torch.is_grad_enabled() or not self.is_plain or not onednn.takes(input, self.weight):
            return super().forward(input)
        bias = None if self.bias is None else self.bias[None]
        if self.kernel_size == (1, 1) and self.by_onednn and self.padding == (0, 0):
            y = onednn.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
            return y.permute(0, 3, 1, 2)
        if self.filters(input, *input.shape[2:]):
            return winograd.convolved(input, self.weight, bias)
        if self.by_onednn and self._few(input):
            return of_patches(input, self.weight, self.bias)
        return super().forward(input)

    @property
    def _pads_numbers_of_zeros(self) -> bool:
        return self.padding_mode == "zeros" and not isinstance(self.padding, str)

    @property
    def is_plain(self) -> bool:
        """Whether it slides by one over a map framed with zeros, all channels together."""
        return self.stride == self.dilation == (1, 1) and self.groups == 1 and self.padding_mode == "zeros"

    def filters(self, x: Tensor, height: int, width: int) -> bool:
        """Whether Winograd's way is taken to results [B, Cout, H, W]."""
        return (
            self.by_winograd
            and self.kernel_size == (3, 3)
            and self.padding == (1, 1)
            and winograd_heuristics.pays(len(x), self.in_channels, self.out_channels, height, width)
        )

    def _few(self, x: Tensor) -> bool:
        """Whether a 3×3 convolution has so few positions that its weights are most of the work.

        oneDNN's convolution reorders them in every call; its product does not.
        """
        positions = len(x) * x.shape[2] * x.shape[3]
        square = self.kernel_size == (3, 3) and self.padding == (1, 1)
        return square and positions <= FEW_POSITIONS <= min(self.weight.shape[:2])


class WinogradUpsample(OptimizedUpsample):
    """``Upsample2D``, whose enlarged map is never made."""

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = (2 * x.shape[2], 2 * x.shape[3]) if size is None else size
        doubles, conv = size == (2 * x.shape[2], 2 * x.shape[3]), self.conv
        if torch.is_grad_enabled() or not doubles or not isinstance(conv, CpuConv2d):
            return super().forward(x, size)
        if conv.is_plain and onednn.takes(x, conv.weight) and conv.filters(x, *size):
            return winograd.convolved(x, conv.weight, None if conv.bias is None else conv.bias[None], doubled=True)
        return super().forward(x, size)


def of_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3×3 convolution, one pixel of zeros around the map, as one product of all patches with all filters."""
    framed = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    patches = framed.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)
    return onednn.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)
