"""The steps of ``backends/ops.py`` as kernels for NVIDIA GPUs, written in Triton.

Maps are channels-last: [B, h, w, C] in memory. Sums are float32 whatever the maps are. Everything here has a reference
in ``elementwise.Plain``, which also takes over what the kernels are not made for: gradients, layouts, dtypes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from russet.backends.ops import PLAIN, Activation, Projection, hooked, resized
from russet.backends.triton import geglu as products
from russet.backends.triton import upsample as doubling
from russet.backends.triton.group_norm import Sums, group_norm, joined, shifted_sum
from russet.backends.triton.tokens import gated, layer_norm

FEW = 32
"""Channels below which positions are too short in memory for the kernels that add to a map, as where a picture ends."""


class Fused:
    """The steps in as few passes over the memory as they can be. One object serves all networks.

    Args:
        silu: the one activation that the kernels know.
        gated_products: whether layers gate what they multiply in one kernel where that pays.
        transposed: whether maps are doubled by transposed convolutions where that pays.
        failed: whether there are no kernels; asked before each use, it waits for those that are being compiled.
    """

    reuses = True

    def __init__(
        self,
        silu: Activation,
        gated_products: bool,
        transposed: bool = False,
        failed: Callable[[], bool] = lambda: False,
    ) -> None:
        self._silu = silu
        self._gated_products = gated_products
        self._transposed = transposed
        self._failed = failed
        self._told: tuple[weakref.ref[Tensor], int, Sums] | None = None

    def normed(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        act: Activation | None = None,
        shift: Tensor | None = None,
        *,
        spare: bool = False,
    ) -> Tensor:
        known = act in (None, self._silu) and type(norm) is nn.GroupNorm and readable(norm)
        if not known or not takes(x) or not (shift is None or computes(shift)) or self._failed():
            return PLAIN.normed(x if shift is None else x + shift[:, :, None, None], norm, act)
        spare = spare and not torch.is_grad_enabled()  # what read x may want it as it was, for a gradient of its own
        return group_norm(x, norm, act is not None, shift, spare, self._sums_of(x))

    def normed_before(self, x: Tensor, norm: nn.GroupNorm, last: Projection) -> tuple[Tensor, bool]:
        known = type(norm) is nn.GroupNorm and readable(norm) and last.bias is not None and readable(last)
        if not known or not takes(x) or self._failed():
            return self.normed(x, norm), False
        return group_norm(x, norm, False, None, told=self._sums_of(x), later=last.bias), True

    def convolved(
        self, x: Tensor, conv: nn.Conv2d, shift: Tensor | None = None, *, whole: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if not takes(x) or not readable(conv) or conv.bias is None or self._failed():
            return PLAIN.convolved(x, conv, shift, whole=whole)
        if conv.kernel_size == (1, 1):  # a product, which adds its bias by itself
            y = F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
        else:
            y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
            if not whole:
                shift = conv.bias[None] if shift is None else shift + conv.bias
        return y, shift

    def doubled(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        if self._transposed and takes(x) and doubling.takes(x, conv) and not self._failed():
            h = doubling.doubled(x, conv.weight)
            return self.added(h, None, None if conv.bias is None else conv.bias[None])
        return resized(self, x, conv, (2 * x.shape[2], 2 * x.shape[3]))

    def added(self, h: Tensor, x: Tensor | None, shift: Tensor | None = None) -> Tensor:
        if shift is None:
            return PLAIN.added(h, x)
        fits = takes(h) and (x is None or (takes(x) and x.shape == h.shape)) and h.shape[1] >= FEW
        if not fits or not computes(shift) or self._failed():
            return PLAIN.added(h.add_(shift[:, :, None, None]), x)
        return self._telling(h, shifted_sum(h, x, shift))

    def joined(self, x: Tensor, kept: Tensor) -> Tensor:
        alike = x.dtype == kept.dtype and x.shape[2:] == kept.shape[2:] and len(x) % len(kept) == 0
        small = (x.shape[1] + kept.shape[1]) * (x.numel() // x.shape[1]) < 2**31
        if not (takes(x) and takes(kept) and alike and small) or self._failed():
            return PLAIN.joined(x, kept)
        return self._telling(*joined(x, kept))

    def _telling(self, x: Tensor, sums: Sums) -> Tensor:
        """A map that was just written, whose sums the next norm may want."""
        self._told = None if x.is_inference() else (weakref.ref(x), x._version, sums)
        return x

    def _sums_of(self, x: Tensor) -> Sums | None:
        """The sums of the map that was written last, if that is it, and nothing has changed it since."""
        told, self._told = self._told, None
        return told[2] if told is not None and told[0]() is x and told[1] == x._version else None

    def added_norm(self, h: Tensor, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        if not (takes_tokens(h, norm) and takes_tokens(x, norm) and h.shape == x.shape) or self._failed():
            return PLAIN.added_norm(h, x, norm)
        return h, layer_norm(h, norm, x)

    def layer_norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        taken = takes_tokens(x, norm) and not self._failed()
        return layer_norm(x, norm, None) if taken else PLAIN.layer_norm(x, norm)

    def geglu(self, x: Tensor, proj: nn.Linear) -> Tensor:
        if not (computes(x) and x.is_contiguous()) or not readable(proj) or self._failed():
            return PLAIN.geglu(x, proj)
        whole = self._gated_products and products.takes(x, proj)
        return products.gated_product(x, proj) if whole else gated(proj(x))

    def added_norm_before(
        self, h: Tensor, x: Tensor, norm: nn.LayerNorm, last: nn.Linear
    ) -> tuple[Tensor, Tensor, bool]:
        taken = takes_tokens(h, norm) and takes_tokens(x, norm) and h.shape == x.shape
        if not taken or not readable(last) or last.bias is None or self._failed():
            return *self.added_norm(h, x, norm), False
        return h, layer_norm(h, norm, x, last.bias), True

    def product_added(self, h: Tensor, last: Projection, x: Tensor, ahead: bool) -> Tensor:
        if not ahead:
            return PLAIN.product_added(h, last, x, ahead)
        # a passage over the sum less than if added after
        x.view(-1, x.shape[-1]).addmm_(h.flatten(0, 1), last.weight.flatten(1).t())
        return x


def computes(x: Tensor) -> bool:
    """Whether the kernels are made for such a tensor: on a GPU, no gradient wanted, 32-bit places."""
    return x.is_cuda and not (torch.is_grad_enabled() and x.requires_grad) and x.numel() < 2**31


def readable(layer: nn.Module) -> bool:
    """Whether the kernels may read a layer's weights: nothing watches it, and no gradient of them is wanted."""
    trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in layer.parameters(recurse=False))
    return not hooked(layer) and not trained


def takes(x: Tensor) -> bool:
    """Whether the kernels take a map: channels-last."""
    return computes(x) and x.is_contiguous(memory_format=torch.channels_last)


def takes_tokens(x: Tensor, norm: nn.LayerNorm) -> bool:
    """Whether the kernels normalise such tokens."""
    plain = type(norm) is nn.LayerNorm and readable(norm) and norm.weight is not None and norm.bias is not None
    return computes(x) and x.is_contiguous() and plain and x.shape[-1] <= 8192
