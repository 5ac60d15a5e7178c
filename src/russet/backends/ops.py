"""What stands between the matrix products of UNet and VAE, in as few passes over the memory as a device allows.

    EagerOps     PyTorch's own operations, in place where that is safe: on every device
    TritonOps    fused kernels for CUDA, in ``backends/triton/ops.py``

Both give the results of the plain networks, up to the rounding of what is written to memory in between. The blocks in
``backends/blocks`` call them, with gradients disabled and on layers that no hook watches.

Letters: B batch, C channels, h w positions of a map, N tokens, D features.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, cat, nn
from torch.nn import functional as F

from russet.models.activations import Activation

Projection = nn.Linear | nn.Conv2d  # of each position, by weights [Dout, Din] or [Dout, Din, 1, 1]

IN_PLACE: Mapping[Activation, Activation] = {
    F.silu: functools.partial(F.silu, inplace=True),
    F.relu: functools.partial(F.relu, inplace=True),
    F.mish: functools.partial(F.mish, inplace=True),
}


class Ops(Protocol):
    """A tensor named ``h`` is the caller's own and may be overwritten; a tensor named ``x`` is left as it is.

    ``writes_in_place``: whether ``group_norm`` puts its result into the memory of a donated ``x``.
    """

    writes_in_place: bool

    def group_norm(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        act: Activation | None = None,
        shift: Tensor | None = None,
        *,
        donated: bool = False,
    ) -> Tensor:
        """``act(norm(x + shift))`` of a map [B, C, h, w]; ``shift`` [1 or B, C] is what ``conv`` left to add."""
        ...

    def group_norm_before(self, x: Tensor, norm: nn.GroupNorm, last: Projection) -> tuple[Tensor, bool]:
        """``norm(x)`` before ``linear_add`` adds ``last``'s product to ``x``, and whether its bias is in ``x`` now."""
        ...

    def conv(
        self, x: Tensor, conv: nn.Conv2d, shift: Tensor | None = None, *, includes_bias: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``conv(x) + shift`` for a ``shift`` [1 or B, C], and the part of the sum that the next operation is left.

        ``includes_bias``: the convolution's bias is part of ``shift``.
        """
        ...

    def add(self, h: Tensor, x: Tensor | None, shift: Tensor | None = None) -> Tensor:
        """``h + shift + x`` for maps [B, C, h, w]."""
        ...

    def cat(self, x: Tensor, skip: Tensor) -> Tensor:
        """The channels of two maps one after another, rows of the second repeated as often as the first has them."""
        ...

    def layer_norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """``norm(x)`` for tokens [B, N, D]."""
        ...

    def add_layer_norm(self, h: Tensor, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """``h + x`` for tokens [B, N, D], and that sum normalised."""
        ...

    def add_layer_norm_before(
        self, h: Tensor, x: Tensor, norm: nn.LayerNorm, last: nn.Linear
    ) -> tuple[Tensor, Tensor, bool]:
        """The same before ``linear_add``, and whether ``last``'s bias is in the sum already (not in what is normed)."""
        ...

    def linear_add(self, h: Tensor, last: Projection, x: Tensor, bias_added: bool) -> Tensor:
        """``last(h) + x`` for tokens [B, N, D]; ``bias_added``: its bias is in ``x``, which may be overwritten then."""
        ...


class EagerOps:
    """PyTorch's own operations."""

    writes_in_place = False

    def group_norm(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        act: Activation | None = None,
        shift: Tensor | None = None,
        *,
        donated: bool = False,
    ) -> Tensor:
        y: Tensor = norm(x if shift is None else x + shift[:, :, None, None])
        return y if act is None else IN_PLACE.get(act, act)(y)

    def group_norm_before(self, x: Tensor, norm: nn.GroupNorm, last: Projection) -> tuple[Tensor, bool]:
        return norm(x), False

    def conv(
        self, x: Tensor, conv: nn.Conv2d, shift: Tensor | None = None, *, includes_bias: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if shift is None:
            return conv(x), None
        if includes_bias and len(shift) == 1:  # the same for all rows, so it can be the bias
            return F.conv2d(x, conv.weight, shift[0], conv.stride, conv.padding), None
        h = F.conv2d(x, conv.weight, None, conv.stride, conv.padding) if includes_bias else conv(x)
        return h.add_(shift[:, :, None, None]), None

    def add(self, h: Tensor, x: Tensor | None, shift: Tensor | None = None) -> Tensor:
        h = h if shift is None else h.add_(shift[:, :, None, None])
        return h if x is None else h.add_(x)

    def cat(self, x: Tensor, skip: Tensor) -> Tensor:
        return cat([x, viewed_rows(skip, len(x))], dim=1)

    def layer_norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return norm(x)  # type: ignore[no-any-return]

    def add_layer_norm(self, h: Tensor, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        total = h.add_(x)
        return total, norm(total)

    def add_layer_norm_before(
        self, h: Tensor, x: Tensor, norm: nn.LayerNorm, last: nn.Linear
    ) -> tuple[Tensor, Tensor, bool]:
        return *self.add_layer_norm(h, x, norm), False

    def linear_add(self, h: Tensor, last: Projection, x: Tensor, bias_added: bool) -> Tensor:
        assert not bias_added, "these operations add no bias early"
        y: Tensor = last(h)
        return y.add_(x)


EAGER = EagerOps()


def repeated_rows(x: Tensor, rows: int) -> Tensor:
    """Rows [B, …], one after another as often as makes ``rows`` of them."""
    return x if len(x) == rows else cat([x] * (rows // len(x)))  # which keeps the memory format


def viewed_rows(x: Tensor, rows: int) -> Tensor:
    """The same to be read only: a single contiguous row is not copied, but expanded."""
    return x.expand(rows, *x.shape[1:]) if len(x) == 1 and x.is_contiguous() else repeated_rows(x, rows)


def whole_conv(ops: Ops, x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``conv(x)``, with nothing left to add."""
    h, rest = ops.conv(x, conv)
    return ops.add(h, None, rest)


def flat_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of tokens [B, N, D] as one long row of them.

    That is the same product, and right where one of three dimensions is wrong: with a bias on M1 and macOS 26
    (pytorch#192934), in half precision on M5 (pytorch#180776).
    """
    return F.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))


def hooked(layer: nn.Module) -> bool:
    """Whether a layer has hooks, a ``forward`` of its own, or is compiled: it must be called, not read."""
    own = vars(layer)
    hooks = layer._forward_pre_hooks or layer._forward_hooks
    return bool(hooks) or "forward" in own or own.get("_compiled_call_impl") is not None
