"""Which attention a network gets on a device: fused where no score matrix is built, else in chunks that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from russet.errors import InputError
from russet.hardware.facts import Facts, gigabytes
from russet.hardware.known_bugs import affected
from russet.models.footprint import Attended
from russet.planning.plan_types import AttentionChoice

FLASH_HEADS = (32, 64, 72, 80, 96, 128, 256)  # mps, torch 2.13 on; its wheels hold them for float32 too
SHORT = 2**28  # bytes of scores at a time even where memory is plenty: long command buffers meet the GPU's watchdog
LONGEST_CONTRACTION = 16384  # keys at a time on chips whose long products are wrong
LEAST_ROOM = 2**27  # bytes for scores, whatever is free: smaller pieces would be slow
WHOLE = AttentionChoice(kind="chunked")
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


def choose_attention(
    facts: Facts, dtype: str, calls: Sequence[Attended], room: int, overflows: bool = False
) -> tuple[AttentionChoice, str]:
    """The attention for a network that makes these calls, with ``room`` bytes for scores, and the reason for it.

    ``overflows``: the network's scores are known to be too large for float16.
    """
    reason = why_not_fused(facts, {call.dim for call in calls}) if calls else None
    if reason is None:
        pad = padding(facts, {call.dim for call in calls})
        exact = "; padding with zeros is exact" if pad else ""
        return AttentionChoice(pad=pad), f"torch's fused kernels build no score matrix{exact}"
    choice = chunks(facts, calls, room)
    whole, part = (max(call.scores(one) for call in calls) * 4 for one in (WHOLE, choice))
    if part == whole:
        reason = f"{reason}; its scores fit in one piece"
    else:
        reason = f"{reason}; scores take {gigabytes(part)} at a time instead of {gigabytes(whole)}"
    return with_upcast(facts, dtype, overflows, choice, reason)


def chunks(facts: Facts, calls: Sequence[Attended], room: int) -> AttentionChoice:
    """The largest pieces whose float32 scores ``room`` bytes hold twice in every call, with pieces of keys thrice."""
    most = min(SHORT, Caps.of(facts).bytes)
    for keys in key_chunks(facts, calls):
        limit = min(room // (2 if keys is None else 3), most)
        for queries in CHUNKS:
            choice = AttentionChoice(kind="chunked", queries=queries, keys=keys)
            if all(call.scores(choice) * 4 <= limit for call in calls):
                return choice
    return AttentionChoice(kind="chunked", queries=CHUNKS[-1], keys=CHUNKS[-1])


def key_chunks(facts: Facts, calls: Sequence[Attended]) -> tuple[int | None, ...]:
    """How many keys to try at a time, the most first; None is all of them."""
    longest = max(call.keys for call in calls)
    if longest > LONGEST_CONTRACTION and affected(facts, "long-contraction"):
        return (LONGEST_CONTRACTION, *CHUNKS)
    return (None, *CHUNKS)


def with_upcast(
    facts: Facts, dtype: str, overflows: bool, choice: AttentionChoice, reason: str
) -> tuple[AttentionChoice, str]:
    """The same in float32 where float16 scores cannot be trusted."""
    if dtype != "float16" or not (overflows or affected(facts, "half-scores")):
        return choice, reason
    why = "this network's scores overflow float16" if overflows else "float16 scores are unreliable on this macOS"
    return replace(choice, upcast=True), f"{reason}; {why}"


def why_not_fused(facts: Facts, dims: set[int]) -> str | None:
    """Why fused attention would build the whole score matrix here, in words; None where it does not."""
    bugs = (affected(facts, bug_id) for bug_id in ("no-sdpa", "no-flash", "no-cpu-flash"))
    if bug := next(filter(None, bugs), None):
        return f"in this torch {bug.what}"
    if facts.device == "mps" and max(dims) > FLASH_HEADS[-1]:
        return f"no flash kernel takes heads of {max(dims)} numbers"
    return None


def padding(facts: Facts, dims: set[int]) -> tuple[int, ...]:
    """The kernels' head sizes that these heads go to; empty where each has a kernel of its own."""
    if not affected(facts, "flash-head-sizes"):
        return ()
    targets = sorted({next(size for size in FLASH_HEADS if size >= dim) for dim in dims})
    return tuple(targets) if set(targets) != dims else ()


def slicing_asked(
    facts: Facts, dtype: str, calls: Sequence[Attended], asked: str | int, overflows: bool = False
) -> tuple[AttentionChoice, str]:
    """What ``enable_attention_slicing`` or ``disable_attention_slicing`` asked for.

    Raises:
        InputError: a slice size larger than the number of heads.
    """
    widest = max(calls, key=lambda call: call.queries)
    if asked == "off":
        if why_not_fused(facts, {call.dim for call in calls}) is None:
            return choose_attention(facts, dtype, calls, 0)[0], "slicing is off; fused kernels build no score matrix"
        rows, reason = max(call.batch * call.heads for call in calls), "slicing is off: the whole score matrix at once"
    elif asked == "auto":
        rows, reason = max(1, widest.heads // 2), "half of the heads at a time"
    else:
        rows, reason = (1 if asked == "max" else int(asked)), "as many heads at a time as were asked for"
        if rows > (fewest := min(call.heads for call in calls)):
            raise InputError(f"the attention slice size must be at most the number of heads, {fewest}, not {asked}")
    return with_upcast(facts, dtype, overflows, AttentionChoice(kind="sliced", rows=rows), reason)
