"""Which attention a network gets on a device: fused where no score matrix is built, else in chunks that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from russet.devices.activations import Attended
from russet.devices.bugs import affected
from russet.devices.choices import AttentionChoice, gigabytes
from russet.devices.facts import Facts
from russet.errors import InputError

FLASH_HEADS = (32, 64, 72, 80, 96, 128, 256)  # mps, torch 2.13 on
SHORT = 2**30  # bytes of scores at a time even where memory is plenty: long command buffers meet the GPU's watchdog
LONGEST_CONTRACTION = 16384  # keys at a time on chips whose long products are wrong
CHUNKS = (4096, 2048, 1024, 512, 256, 128, 64)


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What one tensor must not pass on a device."""

    numbers: int
    bytes: int

    @classmethod
    def of(cls, facts: Facts) -> Caps:
        if facts.device == "mps":
            return cls(numbers=2**31 - 1, bytes=min(2**32 - 1, facts.largest_buffer or 2**32 - 1))
        return cls(numbers=2**31 - 1 if facts.device == "cuda" else 2**62, bytes=2**62)

    def allow(self, numbers: int, width: int) -> bool:
        """Whether a tensor of that many numbers of ``width`` bytes is allowed."""
        return numbers <= self.numbers and numbers * width <= self.bytes


def choose_attention(facts: Facts, dtype: str, calls: Sequence[Attended], room: int) -> tuple[AttentionChoice, str]:
    """The attention for a network that makes these calls, with ``room`` bytes for scores, and the reason for it."""
    dims = {call.dim for call in calls}
    reason = why_not_fused(facts, dtype, dims)
    if reason is None:
        pad = padding(facts, dims)
        padded = "; padding with zeros is exact" if pad else ""
        return AttentionChoice(pad=pad), f"torch's fused kernels build no score matrix{padded}"
    upcast = dtype == "float16" and affected(facts, "half-scores") is not None
    limit = min(room // 2, SHORT, Caps.of(facts).bytes)
    choice = AttentionChoice(kind="chunked", queries=CHUNKS[-1], keys=CHUNKS[-1], upcast=upcast)
    for keys in key_chunks(facts, calls):
        for queries in CHUNKS:
            wider = AttentionChoice(kind="chunked", queries=queries, keys=keys, upcast=upcast)
            if all(call.scores(wider) * 4 <= limit for call in calls):
                return wider, chunk_reason(reason, wider, calls)
    return choice, chunk_reason(reason, choice, calls)


def chunk_reason(reason: str, choice: AttentionChoice, calls: Sequence[Attended]) -> str:
    whole = max(call.batch * call.heads * call.queries * call.keys for call in calls) * 4
    part = max(call.scores(choice) for call in calls) * 4
    exact = "; float16 scores are unreliable on this macOS" if choice.upcast else ""
    return f"{reason}; scores take {gigabytes(part)} at a time instead of {gigabytes(whole)}{exact}"


def key_chunks(facts: Facts, calls: Sequence[Attended]) -> tuple[int | None, ...]:
    """How many keys to try at a time, the most first; None is all of them."""
    longest = max(call.keys for call in calls)
    if longest > LONGEST_CONTRACTION and affected(facts, "long-contraction"):
        return (LONGEST_CONTRACTION, *CHUNKS)
    return (None, *CHUNKS)


def why_not_fused(facts: Facts, dtype: str, dims: set[int]) -> str | None:
    """Why fused attention would build the whole score matrix here, in words; None where it does not."""
    if facts.device == "mps":
        if bug := affected(facts, "no-sdpa") or affected(facts, "no-flash"):
            return f"before torch 2.13, {bug.what}"
        if dtype == "float32":
            return "the flash kernels of mps are for half precision"
        if max(dims) > FLASH_HEADS[-1]:
            return f"no flash kernel takes heads of {max(dims)} numbers"
        return None
    if facts.torch < (2, 0) or (facts.device == "cpu" and facts.torch < (2, 1)):
        return "this torch has no fused attention here that does without the whole score matrix"
    return None


def padding(facts: Facts, dims: set[int]) -> tuple[int, ...]:
    """The kernels' head sizes that these heads go to; empty where each has a kernel of its own."""
    if not affected(facts, "flash-head-sizes"):
        return ()
    targets = sorted({next(size for size in FLASH_HEADS if size >= dim) for dim in dims})
    return tuple(targets) if set(targets) != dims else ()


def asked_attention(
    facts: Facts, dtype: str, calls: Sequence[Attended], asked: str | int
) -> tuple[AttentionChoice, str]:
    """What ``enable_attention_slicing`` or ``disable_attention_slicing`` asked for.

    Raises:
        InputError: a slice size larger than the number of heads.
    """
    upcast = dtype == "float16" and affected(facts, "half-scores") is not None
    if asked == "off":
        if why_not_fused(facts, dtype, {call.dim for call in calls}) is None:
            return choose_attention(facts, dtype, calls, 0)[
                0
            ], "slicing is off; the fused kernels build no score matrix"
        every = max(call.batch * call.heads for call in calls)
        return AttentionChoice(
            kind="sliced", rows=every, upcast=upcast
        ), "slicing is off; the whole score matrix is built"
    fewest = min(call.heads for call in calls)
    if isinstance(asked, int) and asked > fewest:
        raise InputError(f"the attention slice size must be at most the number of heads, {fewest}, not {asked}")
    widest = max(calls, key=lambda call: call.queries)
    rows = {"auto": max(1, widest.heads // 2), "max": 1}.get(asked, asked) if isinstance(asked, str) else asked
    return AttentionChoice(kind="sliced", rows=int(rows), upcast=upcast), "attention slicing is on"
