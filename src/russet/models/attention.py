"""Scaled dot-product attention, ``softmax(scale · q kᵀ + mask) v``, in the ways that differ in speed and memory.

    fused              the kernel that torch has for it
    sliced(rows)       a few of the B·H score matrices at a time
    chunked(…)         queries and keys in pieces; no score matrix ever exists as a whole
    padded(inner, …)   ``inner`` on zero-padded head dimensions
    upcast(inner)      ``inner`` in float32
    contiguous(inner)  ``inner`` on operands whose memory is in order

All share one signature and one result. Those with settings are frozen dataclasses in lower case, since they act as
functions: they compare, hash and print as the call that made them, which is what a log should show.

Letters: B batch, H heads, N queries, M keys, D features of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from russet.errors import InputError

HAS_SDPA = hasattr(F, "scaled_dot_product_attention")  # torch 2.0
SDPA_TAKES_SCALE = torch.__version__ >= "2.1"  # compared as versions, not as text


class AttentionFunction(Protocol):
    """What every function of this module is.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, H, M, D].
        v: values [B, H, M, Dv].
        scale: what the scores are multiplied by, usually ``D ** -0.5``.
        mask: None, or floats of q's dtype that broadcast to [B, H, N, M] and are added to the scaled scores.

    Returns:
        [B, H, N, Dv] in the dtype of q. Where it can be chosen the memory is ordered [B, N, H, Dv], so that joining
        the heads afterwards copies nothing.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor: ...


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention by torch's own kernel; by plain products before torch 2.0, which has none.

    The mask is always explicit: ``is_causal`` leaks future tokens in half precision on mps (pytorch#195910).
    """
    if not HAS_SDPA:
        return plain(q, k, v, scale, mask)
    if q.shape[2] <= 8:  # a kernel for few queries ignores strides: wrong values (pytorch#163597, pytorch#181133)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if SDPA_TAKES_SCALE:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return F.scaled_dot_product_attention(q * (scale * math.sqrt(q.shape[-1])), k, v, attn_mask=mask)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention as its formula says, with all B·H·N·M scores in memory.

    q is scaled before the product, which keeps half-precision scores small. Deliberately no ``baddbmm`` into an empty
    tensor: on mps it reads what it should ignore (pytorch#187521).
    """
    scores = (q * scale) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


@dataclass(frozen=True)
class sliced:
    """Attention with at most ``rows`` of the B·H score matrices in memory at a time.

    Raises:
        InputError: ``rows`` is not a positive int.
    """

    rows: int

    def __post_init__(self) -> None:
        _require_positive(self, rows=self.rows)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        batch, heads = q.shape[:2]
        items, rows = max(1, self.rows // heads), min(heads, self.rows)
        mask = _spread(mask, q, k)
        out = _like_tokens(q, v)
        for b in range(0, batch, items):
            for h in range(0, heads, rows):
                part = slice(b, b + items), slice(h, h + rows)
                out[part] = plain(q[part], k[part], v[part], scale, None if mask is None else mask[part])
        return out


@dataclass(frozen=True)
class chunked:
    """Attention over ``queries`` × ``keys`` scores of every head at a time, by the online softmax of arXiv:1805.02867.

    The softmax is float32 whatever the dtype, and so are its running maximum, sum and weighted values. Without ``keys``
    all keys are taken at once: less work, and still only ``queries`` rows of each score matrix; of one with fewer keys
    than queries, as attention to a text has it, as many more rows as make no more scores than a square one would.

    Raises:
        InputError: ``queries`` or ``keys`` is not a positive int.
    """

    queries: int
    keys: int | None = None

    def __post_init__(self) -> None:
        _require_positive(self, queries=self.queries, keys=1 if self.keys is None else self.keys)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        mask = _spread(None if mask is None else mask.float(), q, k)  # as the scores are
        out = _like_tokens(q, v)
        q, k, v = q.contiguous() * scale, k.contiguous(), v.contiguous()  # once, or each product would copy them again
        step, rows = self.queries, self._piece_by_piece
        if self.keys is None or self.keys >= k.shape[2]:
            step, rows = max(step, step * q.shape[2] // k.shape[2]), self._at_once
        for n in range(0, q.shape[2], step):
            part = slice(n, n + step)
            out[:, :, part] = rows(q[:, :, part], k, v, None if mask is None else mask[:, :, part])
        return out

    def _at_once(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The result for some queries, already scaled, over all keys."""
        scores = (q @ k.transpose(-1, -2)).float()
        if mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1)
        del scores
        return weights.to(v.dtype) @ v

    def _piece_by_piece(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The result for some queries, already scaled, gathered over pieces of the keys."""
        shape = (*q.shape[:3], 1)
        # Not -inf: a first piece that is masked out altogether would give exp(-inf + inf).
        top = torch.full(shape, torch.finfo(torch.float32).min, device=q.device)
        total = torch.zeros(shape, device=q.device)
        values = torch.zeros((*q.shape[:3], v.shape[-1]), device=q.device)
        step = self.keys or k.shape[2]
        for m in range(0, k.shape[2], step):
            part = slice(m, m + step)
            scores = (q @ k[:, :, part].transpose(-1, -2)).float()
            if mask is not None:
                scores = scores + mask[..., part]
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights = (scores - new_top).exp()
            shrink = (top - new_top).exp()
            total = total * shrink + weights.sum(-1, keepdim=True)
            values = values * shrink + weights.to(v.dtype) @ v[:, :, part]
            top = new_top
        return (values / total).to(v.dtype)


@dataclass(frozen=True)
class padded:
    """``inner`` on heads zero-padded to the smallest of ``dims`` that holds them; larger heads are left as they are.

    Exact, since zeros add nothing to a product. It brings kernels into play that exist for certain head dimensions
    only: Stable Diffusion 1's 40 and 160 run as 64 and 256.

    Raises:
        InputError: ``dims`` is empty or holds something else than positive ints.
    """

    inner: AttentionFunction
    dims: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(sorted(self.dims)))
        if not self.dims:
            raise InputError("padded: dims is empty; give the head dimensions to pad to, such as (64, 256)")
        for dim in self.dims:
            _require_positive(self, dims=dim)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        largest = max(q.shape[-1], k.shape[-1], v.shape[-1])
        q, k, padded_v = (self.pad(x, largest) for x in (q, k, v))
        return self.inner(q, k, padded_v, scale, mask)[..., : v.shape[-1]]

    def pad(self, x: Tensor, least: int = 0) -> Tensor:
        """``x`` [..., D] zero-padded to the size that holds it and ``least`` features."""
        size = self.padded_size(max(x.shape[-1], least))
        return F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x

    def padded_size(self, features: int) -> int:
        """The size that heads of so many features are padded to."""
        return next((dim for dim in self.dims if dim >= features), features)


@dataclass(frozen=True)
class upcast:
    """``inner`` in float32, for scores too large for half precision; the result has the dtype of q again."""

    inner: AttentionFunction

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        wide = None if mask is None else mask.float()
        q32, k32, v32 = (x.to(torch.float32, memory_format=torch.contiguous_format) for x in (q, k, v))
        return self.inner(q32, k32, v32, scale, wide).to(q.dtype)


@dataclass(frozen=True)
class contiguous:
    """``inner`` on operands whose memory is in order: kernels exist that read strided ones wrongly."""

    inner: AttentionFunction

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        return self.inner(q.contiguous(), k.contiguous(), v.contiguous(), scale, mask)


def is_fused(attention: AttentionFunction) -> bool:
    """Whether ``attention`` leaves it all to torch's own kernel, on padded heads or not."""
    return attention is fused or (isinstance(attention, padded) and is_fused(attention.inner))


def padded_heads(attention: AttentionFunction, x: Tensor) -> Tensor:
    """``x`` [..., D] with its features zero-padded if ``attention`` would pad them: once instead of in every call."""
    return attention.pad(x) if isinstance(attention, padded) else x


def padded_size(attention: AttentionFunction, features: int) -> int:
    """What ``attention`` pads heads of so many features to."""
    return attention.padded_size(features) if isinstance(attention, padded) else features


def _spread(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as a view [B, H, N, M], so that a piece of it is a slice; nothing is copied."""
    return None if mask is None else mask.expand(*q.shape[:3], k.shape[2])


def _like_tokens(q: Tensor, v: Tensor) -> Tensor:
    """Room for a result [B, H, N, Dv] in token order: the heads of one token lie side by side."""
    batch, heads, n, _ = q.shape
    return v.new_empty(batch, n, heads, v.shape[-1]).transpose(1, 2)


def _require_positive(owner: object, **sizes: object) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{type(owner).__name__}: {name} must be a positive int, not {size!r}")
