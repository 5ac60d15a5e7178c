"""The operations of ``backends/ops.py`` as kernels for NVIDIA GPUs, written in Triton.

Maps are channels-last: [B, h, w, C] in memory. Sums are float32 whatever the maps are. ``EagerOps`` takes over what the
kernels are not made for: layouts, dtypes, activations.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from russet.backends.ops import EAGER, Projection, hooked
from russet.backends.triton import warmup
from russet.backends.triton.group_norm import ChannelSums, concatenated, group_norm, shifted_sum
from russet.backends.triton.tokens import layer_norm
from russet.models.activations import Activation

FEWEST_CHANNELS = 32
"""Channels below which positions are too short in memory for the kernels that add to a map, as where a picture ends."""


class TritonOps:
    """The operations in as few passes over the memory as they can be. One object serves all networks."""

    writes_in_place = True

    def __init__(self) -> None:
        self._latest: tuple[weakref.ref[Tensor], int, ChannelSums] | None = None

    def group_norm(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        act: Activation | None = None,
        shift: Tensor | None = None,
        *,
        donated: bool = False,
    ) -> Tensor:
        known = act in (None, F.silu) and type(norm) is nn.GroupNorm and not hooked(norm)
        if not known or not takes(x) or not (shift is None or computes(shift)) or not warmup.ready():
            return EAGER.group_norm(x, norm, act, shift)
        return group_norm(x, norm, act is not None, shift, in_place=donated, sums=self._sums_of(x))

    def group_norm_before(self, x: Tensor, norm: nn.GroupNorm, last: Projection) -> tuple[Tensor, bool]:
        if type(norm) is not nn.GroupNorm or last.bias is None or not takes(x) or not warmup.ready():
            return self.group_norm(x, norm), False
        return group_norm(x, norm, False, None, sums=self._sums_of(x), later_bias=last.bias), True

    def conv(
        self, x: Tensor, conv: nn.Conv2d, shift: Tensor | None = None, *, includes_bias: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if not takes(x) or not reads(conv) or conv.bias is None or not warmup.ready():
            return EAGER.conv(x, conv, shift, includes_bias=includes_bias)
        if conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0):  # a product, which adds its bias
            y = F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
        else:
            y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
            if not includes_bias:
                shift = conv.bias[None] if shift is None else shift + conv.bias
        return y, shift

    def add(self, h: Tensor, x: Tensor | None, shift: Tensor | None = None) -> Tensor:
        if shift is None:
            return EAGER.add(h, x)
        fits = takes(h) and (x is None or (takes(x) and x.shape == h.shape)) and h.shape[1] >= FEWEST_CHANNELS
        if not fits or not computes(shift) or not warmup.ready():
            return EAGER.add(h, x, shift)
        return self._remember(h, shifted_sum(h, x, shift))

    def cat(self, x: Tensor, skip: Tensor) -> Tensor:
        alike = x.dtype == skip.dtype and x.shape[2:] == skip.shape[2:] and len(x) % len(skip) == 0
        small = (x.shape[1] + skip.shape[1]) * (x.numel() // x.shape[1]) < 2**31
        if not (takes(x) and takes(skip) and alike and small) or not warmup.ready():
            return EAGER.cat(x, skip)
        return self._remember(*concatenated(x, skip))

    def _remember(self, x: Tensor, sums: ChannelSums) -> Tensor:
        """A map that was just written, whose sums the next norm may want."""
        self._latest = None if x.is_inference() else (weakref.ref(x), x._version, sums)
        return x

    def _sums_of(self, x: Tensor) -> ChannelSums | None:
        """The sums of the map that was written last, if that is it, and nothing has changed it since."""
        latest, self._latest = self._latest, None
        return latest[2] if latest is not None and latest[0]() is x and latest[1] == x._version else None

    def layer_norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return layer_norm(x, norm, None) if takes_tokens(x, norm) and warmup.ready() else EAGER.layer_norm(x, norm)

    def add_layer_norm(self, h: Tensor, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        if not (takes_tokens(h, norm) and takes_tokens(x, norm) and h.shape == x.shape) or not warmup.ready():
            return EAGER.add_layer_norm(h, x, norm)
        return h, layer_norm(h, norm, x)

    def add_layer_norm_before(
        self, h: Tensor, x: Tensor, norm: nn.LayerNorm, last: nn.Linear
    ) -> tuple[Tensor, Tensor, bool]:
        takes_both = takes_tokens(h, norm) and takes_tokens(x, norm) and h.shape == x.shape
        if not takes_both or last.bias is None or not warmup.ready():
            return *self.add_layer_norm(h, x, norm), False
        return h, layer_norm(h, norm, x, last.bias), True

    def linear_add(self, h: Tensor, last: Projection, x: Tensor, bias_added: bool) -> Tensor:
        if not bias_added:
            return EAGER.linear_add(h, last, x, bias_added)
        # one pass over the sum less than if the product was added afterwards
        x.view(-1, x.shape[-1]).addmm_(h.flatten(0, 1), last.weight.flatten(1).t())
        return x


TRITON = TritonOps()


def computes(x: Tensor) -> bool:
    """Whether the kernels are made for such a tensor: on a GPU, with 32-bit offsets."""
    return x.is_cuda and x.numel() < 2**31


def takes(x: Tensor) -> bool:
    """Whether the kernels take a map: channels-last."""
    return computes(x) and x.is_contiguous(memory_format=torch.channels_last)


def reads(conv: nn.Conv2d) -> bool:
    """Whether a convolution is nothing but its weights, which may be read."""
    plain = conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    return type(conv) is nn.Conv2d and plain and not hooked(conv)


def takes_tokens(x: Tensor, norm: nn.LayerNorm) -> bool:
    """Whether the kernels normalise such tokens."""
    plain = type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None
    return computes(x) and x.is_contiguous() and plain and x.shape[-1] <= 8192
