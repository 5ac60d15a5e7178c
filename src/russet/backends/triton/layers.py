"""Layers whose products are kernels of their own, for NVIDIA GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from russet.backends.blocks.resnet import OptimizedUpsample
from russet.backends.triton import geglu, upsample, warmup
from russet.backends.triton.group_norm import shifted_sum
from russet.backends.triton.ops import computes, takes
from russet.backends.triton.tokens import gated
from russet.models.transformer import GEGLU


class TritonGEGLU(GEGLU):
    """``GEGLU`` with its gate as one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not (computes(x) and x.is_contiguous()) or not warmup.ready():
            return super().forward(x)
        return gated(self.proj(x))


class FusedGEGLU(TritonGEGLU):
    """``GEGLU`` as one kernel, the product included."""

    def forward(self, x: Tensor) -> Tensor:
        runs = computes(x) and x.is_contiguous() and geglu.takes(x, self.proj)
        if torch.is_grad_enabled() or not runs or not warmup.ready():
            return super().forward(x)
        return geglu.gated_product(x, self.proj)


class TransposedUpsample(OptimizedUpsample):
    """``Upsample2D`` as one transposed convolution where that is less work."""

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        doubles = size is None or size == (2 * x.shape[2], 2 * x.shape[3])
        runs = doubles and takes(x) and upsample.takes(x, self.conv)
        if torch.is_grad_enabled() or not runs or not warmup.ready():
            return super().forward(x, size)
        h = upsample.upsampled(x, self.conv.weight)
        if self.conv.bias is not None:
            shifted_sum(h, None, self.conv.bias[None])
        return h
