"""Scaled dot-product attention as each torch version computes it on mps: kernels, inner memory, defects.

| torch     | how |
|-----------|-----|
| < 2.0     | there is no such function |
| 2.0 – 2.4 | composite: q and k scaled, product, mask, softmax, product; scores and probabilities at once in memory |
| 2.5 –     | one graph that writes the whole score matrix, in the dtype of q |
| 2.8 –     | a kernel without it for at most 8 queries and some head sizes |
| 2.13 –    | a flash kernel without it for more queries and some head sizes |

The head sizes and dtypes of the flash kernels were read from the strings of PyPI's macOS wheel of torch 2.13.0, the
rest from pytorch's Attention.mm. All of them write a new tensor in the order [B, H, N, D], however the queries lie
(``at::empty(q.sizes())``), so putting the heads together again is a copy. What MPSGraph holds inside a graph on top of
these tensors is not known, nor counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import rules
from .defects import mangle

if TYPE_CHECKING:
    from .machine import VirtualMac

FLASH_HEADS = (32, 64, 72, 80, 96, 128, 256)
FEW_QUERIES = 8
FEW_QUERIES_HEADS = (64, 96, 128)
BIG_SCORES = 2**32

compute = getattr(F, "scaled_dot_product_attention", None)  # the installed torch's own, before a Mac hides it


@dataclass(frozen=True)
class Call:
    """The arguments of one call; q [..., N, D], k [..., M, D], v [..., M, Dv], on the host."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None

    @property
    def scores(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.k.shape[-2])

    @property
    def strided(self) -> bool:
        return not all(x.is_contiguous() for x in (self.q, self.k, self.v))


def refuse(mac: VirtualMac, given: dict[str, Any]) -> None:
    """Raises for what the virtual torch's function does not take."""
    if mac.has("no-sdpa"):
        raise AttributeError("module 'torch.nn.functional' has no attribute 'scaled_dot_product_attention'")
    if given.get("scale") is not None and mac.torch < (2, 1):
        raise TypeError("scaled_dot_product_attention() got an unexpected keyword argument 'scale'")
    if given.get("dropout_p"):
        raise rules.Hazard("attention with dropout is not part of the virtual device, which only infers")


def run(mac: VirtualMac, call: Call) -> Tensor:
    """The result [..., N, Dv] on the host, with the machine's defects; counts kernels and inner memory."""
    rules.check_operands(x for x in (call.q, call.k, call.v, call.mask) if x is not None)
    charge(mac, call)
    if mac.has("value-head-size") and call.v.shape[-1] != call.q.shape[-1]:
        return call.q.new_ones(call.q.shape)
    if call.q.is_meta:
        return call.q.new_empty((*call.q.shape[:-1], call.v.shape[-1]))
    out = values(mac, call).contiguous()  # mps writes [B, H, N, D]; the CPU kernel has it [B, N, H, D]
    misread = call.strided and (mac.has("strided-attention") or (mac.has("short-queries") and is_short(mac, call)))
    if misread or (mac.has("big-scores") and math.prod(call.scores) > BIG_SCORES and not is_flash(mac, call)):
        mangle(out)
    return out


def values(mac: VirtualMac, call: Call) -> Tensor:
    """The numbers, by the CPU's kernel or by what a defect makes of them."""
    q, k = call.q, call.k
    mask, causal = call.mask, call.causal
    half = q.dtype in (torch.float16, torch.bfloat16)
    if causal and half and mac.has("causal-leak"):  # up to three tokens ahead are seen
        mask, causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(3), False
    if q.dtype == torch.float16 and mac.has("half-scores") and not is_flash(mac, call):
        return overflowing(call, mask, causal)
    scale = {} if call.scale is None else {"scale": call.scale}
    assert compute is not None
    return compute(q, k, call.v, attn_mask=mask, is_causal=causal, **scale)


def overflowing(call: Call, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention whose products are rounded to float16 before they are scaled: beyond 65504 they are infinite."""
    scores = (call.q.float() @ call.k.float().transpose(-1, -2)).half().float()
    scores = scores * (call.q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
    return (scores.softmax(-1) @ call.v.float()).half()


def charge(mac: VirtualMac, call: Call) -> None:
    """Counts kernels and inner memory.

    Raises:
        ProcessAborted: the score matrix is larger than Metal takes.
        RuntimeError: there is no memory for it.
    """
    itemsize = call.q.element_size()
    scores = math.prod(call.scores) * itemsize
    if mac.torch < (2, 5):
        mac.account.kernel("scaled_dot_product_attention", 5 + (call.mask is not None) + 3 * call.causal)
        rules.check_operand(call.scores, itemsize)
        mac.account.check(scores)
        mac.account.scratch((call.q.numel() + call.k.numel()) * itemsize + 2 * scores)
        return
    mac.account.kernel("scaled_dot_product_attention")
    if is_flash(mac, call) or is_short(mac, call):
        return
    rules.check_operand(call.scores, itemsize)
    gathered = 0
    if mac.torch < (2, 6) or mac.macos < (15,):  # torch itself makes the operands contiguous first
        copies = [x for x in (call.q, call.k, call.v) if not x.is_contiguous()]
        mac.account.kernel("contiguous", len(copies))
        gathered = sum(x.numel() for x in copies) * itemsize
    mac.account.check(scores)
    result = math.prod(call.q.shape[:-1]) * call.v.shape[-1] * itemsize
    mac.account.scratch(gathered + scores + result)


def is_flash(mac: VirtualMac, call: Call) -> bool:
    """Whether a kernel runs that never holds the scores of many queries."""
    head = call.q.shape[-1]
    return (
        mac.torch >= (2, 13)
        and call.q.shape[-2] > FEW_QUERIES
        and head in FLASH_HEADS
        and head == call.v.shape[-1]
        and (call.mask is None or call.mask.dtype in (torch.bool, call.q.dtype))
    )


def is_short(mac: VirtualMac, call: Call) -> bool:
    """Whether the kernel for few queries runs."""
    head = call.q.shape[-1]
    return (
        mac.torch >= (2, 8)
        and call.q.shape[-2] <= min(FEW_QUERIES, call.k.shape[-2])
        and head in FEW_QUERIES_HEADS
        and head == call.v.shape[-1]
        and (call.mask is None or call.mask.dtype in (torch.bool, call.q.dtype))
    )
