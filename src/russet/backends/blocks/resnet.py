"""The residual block and the changes of resolution, in place and on donated buffers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from russet.backends.blocks.inputs import TimeShifts, plain_time
from russet.backends.donation import Donated, taken
from russet.backends.ops import EAGER, IN_PLACE, Ops, whole_conv
from russet.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D

INT32_END = 2**31


class ShortcutProduct(Protocol):
    """A residual block's last convolution and its shortcut as one sum, for calls with ``rows`` rows."""

    rows: int

    def added(self, h: Tensor, x: Tensor) -> Tensor:
        """The convolution of ``h`` [B, Cout, h, w] plus the shortcut of ``x`` [B, Cin, h, w]."""
        ...


class OptimizedResnet(ResnetBlock2D):
    """``ResnetBlock2D``; what is overwritten is a convolution's or a norm's own output, or a donated input."""

    ops: Ops = EAGER
    shortcut_product: ShortcutProduct | None = None

    def forward(self, x: Tensor | Donated, emb: Tensor | TimeShifts | None = None) -> Tensor:
        donated, x = isinstance(x, Donated), taken(x)
        if torch.is_grad_enabled():
            return super().forward(x, None if emb is None else plain_time(emb))
        ops, product = self.ops, self.shortcut_product
        if product is not None and product.rows != len(x):
            product = None
        shift, includes_bias = self._shift(emb)
        # early, so that the norm can take the memory of x, which is free once it is convolved
        early = donated and ops.writes_in_place and product is None and self.conv_shortcut is not None
        beside = self._shortcut(x) if early else None
        h = ops.group_norm(x, self.norm1, self.act, donated=early)
        if beside is not None:
            x = beside
        if self.scale_shift and shift is not None:
            h = whole_conv(ops, h, self.conv1)  # in two lines, so that what was convolved is free
            h = ops.group_norm(h, self.norm2)
            scale, offset = shift[:, :, None, None].chunk(2, dim=1)
            h = IN_PLACE.get(self.act, self.act)(h.mul_(1 + scale).add_(offset))
        else:
            h, rest = ops.conv(h, self.conv1, shift, includes_bias=includes_bias)
            h = ops.group_norm(h, self.norm2, self.act, rest, donated=True)
        if product is not None:
            h = product.added(h, x)
        else:
            h, rest = ops.conv(h, self.conv2)
            h = ops.add(h, self._shortcut(x) if beside is None else beside, rest)
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor

    def _shift(self, emb: Tensor | TimeShifts | None) -> tuple[Tensor | None, bool]:
        if emb is None or self.time_emb_proj is None:
            return None, False
        return emb.shift(self.time_emb_proj) if isinstance(emb, TimeShifts) else (self.time_emb_proj(emb), False)

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.conv_shortcut is None else whole_conv(self.ops, x, self.conv_shortcut)


class OptimizedDownsample(Downsample2D):
    """``Downsample2D``."""

    ops: Ops = EAGER

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return whole_conv(self.ops, x if self.padding else F.pad(x, (0, 1, 0, 1)), self.conv)


class OptimizedUpsample(Upsample2D):
    """``Upsample2D``."""

    ops: Ops = EAGER

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = (2 * x.shape[2], 2 * x.shape[3]) if size is None else size
        if torch.is_grad_enabled():
            return super().forward(x, size)
        if x.numel() // (x.shape[2] * x.shape[3]) * size[0] * size[1] >= INT32_END:
            x = x.contiguous()  # the CUDA kernel for channels-last counts with 32 bits (pytorch#141831)
        return whole_conv(self.ops, F.interpolate(x, size=size, mode="nearest"), self.conv)
