"""What stands between the matrix products of UNet and VAE: norms, activations and sums over maps and tokens.

    Plain    PyTorch's own operations, on every device
    Fused    the same in fewer passes over the memory: kernels for CUDA, in ``backends/triton/ops.py``
    OnCPU    the same with fewer multiplications, in ``backends/cpu/ops.py``

All give the same results, up to the rounding of what ``Plain`` writes to memory in between. On a GPU these steps take
half of the time of a UNet call if each is a pass of its own: 4.5 of 9.3 ms on an H200 (Stable Diffusion 1.5 at
512×512, guided, float16), and 49 of 98 ms for sixteen pictures.

Letters: B batch, C channels, h w positions of a map, N tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, cat, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]
Projection = nn.Linear | nn.Conv2d  # of each position, by weights [Dout, Din] or [Dout, Din, 1, 1]


class Elementwise(Protocol):
    """The steps. A tensor named ``h`` is the caller's own and may be overwritten; a tensor named ``x`` is kept.

    ``reuses``: whether ``normed`` puts its result in place of a spare x.
    """

    reuses: bool

    def normed(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        act: Activation | None = None,
        shift: Tensor | None = None,
        *,
        spare: bool = False,
    ) -> Tensor:
        """``act(norm(x + shift))`` of a map [B, C, h, w]; ``shift`` [1 or B, C] is what ``convolved`` left to add.

        Nothing needs a ``spare`` x any more: the result may take its memory.
        """
        ...

    def normed_before(self, x: Tensor, norm: nn.GroupNorm, last: Projection) -> tuple[Tensor, bool]:
        """``norm(x)`` before ``product_added`` to a spare map x, and whether ``last``'s bias is in x already."""
        ...

    def convolved(
        self, x: Tensor, conv: nn.Conv2d, shift: Tensor | None = None, *, whole: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``conv(x) + shift`` for a ``shift`` [1 or B, C], and what of it the next step is left to add.

        A ``whole`` shift holds the convolution's bias already.
        """
        ...

    def doubled(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """``conv`` of a map [B, C, h, w] whose every pixel is taken as 2×2 equal ones."""
        ...

    def added(self, h: Tensor, x: Tensor | None, shift: Tensor | None = None) -> Tensor:
        """``h + shift + x`` for maps [B, C, h, w]."""
        ...

    def joined(self, x: Tensor, kept: Tensor) -> Tensor:
        """The channels of two maps one after another, rows of the second repeated as often as the first has them."""
        ...

    def added_norm(self, h: Tensor, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """``h + x`` for tokens [B, N, D], and that sum normalised."""
        ...

    def layer_norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """``norm(x)`` for tokens [B, N, D]."""
        ...

    def geglu(self, x: Tensor, proj: nn.Linear) -> Tensor:
        """Of ``proj(x)`` [B, N, 2D] the first half of the features times the GELU of the second (arXiv:2002.05202)."""
        ...

    def added_norm_before(
        self, h: Tensor, x: Tensor, norm: nn.LayerNorm, last: nn.Linear
    ) -> tuple[Tensor, Tensor, bool]:
        """The same before ``product_added``, and whether ``last``'s bias is in the sum already, though not its norm."""
        ...

    def product_added(self, h: Tensor, last: Projection, x: Tensor, ahead: bool) -> Tensor:
        """``last(h) + x`` for tokens [B, N, D]; ``ahead``: its bias is in x, which may be overwritten then."""
        ...


class Plain:
    """The steps as PyTorch has them."""

    reuses = False

    def normed(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        act: Activation | None = None,
        shift: Tensor | None = None,
        *,
        spare: bool = False,
    ) -> Tensor:
        assert shift is None, "nothing is left to add"
        y: Tensor = norm(x)
        return y if act is None else act(y)

    def normed_before(self, x: Tensor, norm: nn.GroupNorm, last: Projection) -> tuple[Tensor, bool]:
        return self.normed(x, norm), False

    def convolved(
        self, x: Tensor, conv: nn.Conv2d, shift: Tensor | None = None, *, whole: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if shift is None:
            return conv(x), None
        if whole and len(shift) == 1:  # the same for all rows, so it can be the bias
            return F.conv2d(x, conv.weight, shift[0], conv.stride, conv.padding), None
        h = F.conv2d(x, conv.weight, None, conv.stride, conv.padding) if whole else conv(x)
        return h.add_(shift[:, :, None, None]), None

    def doubled(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return resized(self, x, conv, (2 * x.shape[2], 2 * x.shape[3]))

    def added(self, h: Tensor, x: Tensor | None, shift: Tensor | None = None) -> Tensor:
        assert shift is None, "nothing is left to add"
        return h if x is None else h.add_(x)

    def joined(self, x: Tensor, kept: Tensor) -> Tensor:
        return cat([x, seen(kept, len(x))], dim=1)

    def added_norm(self, h: Tensor, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        total = h.add_(x)
        return total, norm(total)

    def layer_norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return norm(x)  # type: ignore[no-any-return]

    def geglu(self, x: Tensor, proj: nn.Linear) -> Tensor:
        return gated(proj(x))

    def added_norm_before(
        self, h: Tensor, x: Tensor, norm: nn.LayerNorm, last: nn.Linear
    ) -> tuple[Tensor, Tensor, bool]:
        return *self.added_norm(h, x, norm), False

    def product_added(self, h: Tensor, last: Projection, x: Tensor, ahead: bool) -> Tensor:
        assert not ahead, "nothing is added before its time"
        return self.added(last(h), x)


def repeated(x: Tensor, rows: int) -> Tensor:
    """Rows [B, …], one after another as often as makes ``rows`` of them: pictures that several texts are about."""
    return x if len(x) == rows else cat([x] * (rows // len(x)))  # which keeps the memory format


def seen(x: Tensor, rows: int) -> Tensor:
    """The same to be read only: a single row in order is not copied, but seen ``rows`` times."""
    return x.expand(rows, *x.shape[1:]) if len(x) == 1 and x.is_contiguous() else repeated(x, rows)


def gated(h: Tensor) -> Tensor:
    """The first half of the features [B, N, 2D] times the GELU of the second."""
    value, gate = h.chunk(2, dim=-1)
    return gelu(gate).mul_(value)


def gelu(x: Tensor) -> Tensor:
    """``F.gelu``; in float32 where half precision ends the process: on mps before torch 2.0 (pytorch#86218)."""
    if x.dtype == torch.float16 and x.device.type == "mps" and torch.__version__ < "2.0":  # as versions, not as text
        return F.gelu(x.float()).to(x.dtype)
    return F.gelu(x)


def convolution(steps: Elementwise, x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``conv(x)``, with nothing left to add."""
    h, rest = steps.convolved(x, conv)
    return steps.added(h, None, rest)


def resized(steps: Elementwise, x: Tensor, conv: nn.Conv2d, size: tuple[int, int]) -> Tensor:
    """``conv`` of a map whose pixels are repeated until it is of that size [h, w]."""
    if x.numel() * 4 >= 2**31:
        x = x.contiguous()  # the CUDA kernel for channels-last counts with 32 bits (pytorch#141831)
    return convolution(steps, F.interpolate(x, size=size, mode="nearest"), conv)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of tokens [B, N, D] as one long row of them.

    That is the same product, and right where one of three dimensions is wrong: with a bias on M1 and macOS 26
    (pytorch#192934), in half precision on M5 (pytorch#180776).
    """
    return F.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))


def hooked(layer: nn.Module) -> bool:
    """Whether something watches or feeds a layer as it is called, so that its weights must not be read directly."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks)


PLAIN = Plain()
