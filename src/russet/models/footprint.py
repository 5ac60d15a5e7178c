"""Bytes that a network's activations take at their peak, its parameters not counted, by walking over its shapes.

A walk follows a network's ``forward`` and notes what is alive at once at the moments that can be the widest. Maps and
tokens are counted in bytes; ``x`` is always what a block was given, which its caller holds until it returns. What
passes change is part of ``Arithmetic``. The walk of each network stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

TEXT = 77  # tokens of a prompt


class ScoreBlocks(Protocol):
    """How attention is computed: ``planning.plan_types.AttentionChoice``."""

    @property
    def kind(self) -> str: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def queries(self) -> int | None: ...
    @property
    def keys(self) -> int | None: ...
    @property
    def pad(self) -> tuple[int, ...]: ...
    @property
    def upcast(self) -> bool: ...


@dataclass(frozen=True)
class Fused:
    """Attention by PyTorch's own kernel, which builds no scores."""

    kind: str = "fused"
    rows: int | None = None
    queries: int | None = None
    keys: int | None = None
    pad: tuple[int, ...] = ()
    upcast: bool = False


FUSED = Fused()


@dataclass(frozen=True, kw_only=True)
class Attended:
    """One attention call: ``batch`` rows of ``heads`` heads of ``dim`` numbers, ``queries`` tokens against ``keys``."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int

    @classmethod
    def own(cls, batch: int, heads: int, tokens: int, features: int) -> Attended:
        """Self-attention of ``batch`` rows of tokens."""
        return cls(batch=batch, heads=heads, queries=tokens, keys=tokens, dim=features // heads)

    def scores(self, choice: ScoreBlocks) -> int:
        """Numbers in the largest score tensor; 0 where none is built."""
        matrices = self.batch * self.heads
        if choice.kind == "fused":
            return 0
        if choice.kind == "sliced":
            return min(choice.rows or 1, matrices) * self.queries * self.keys
        return matrices * self.rows(choice) * min(choice.keys or self.keys, self.keys)

    def rows(self, choice: ScoreBlocks) -> int:
        """Queries of each matrix that chunked attention takes at a time."""
        rows = choice.queries or self.queries
        if choice.keys is None or choice.keys >= self.keys:
            rows = max(rows, rows * self.queries // self.keys)
        return min(rows, self.queries)

    def scratch(self, choice: ScoreBlocks, width: int) -> int:
        """Bytes at the widest moment beside queries, keys and values: padded or float32 copies, scores, the result."""
        numbers = self.batch * self.heads * self.dim
        q, k = numbers * self.queries, numbers * self.keys
        inner, copies = width, 0
        if choice.upcast and width < 4:
            inner, copies = 4, (q + 2 * k) * 4 + q * width
        padded = next((size for size in choice.pad if size >= self.dim), self.dim)
        if padded > self.dim:
            copies += (q + 2 * k) // self.dim * padded * inner
            q = q // self.dim * padded
        scores = self.scores(choice)
        if choice.kind == "sliced":  # scores and their softmax, the values in order, and their product
            taken = min(choice.rows or 1, self.batch * self.heads)
            copied = 0 if self.heads == 1 else k
            scores = 2 * scores * inner + taken * (q + copied) // (self.batch * self.heads) * inner
        elif choice.kind == "chunked":
            queries = self.rows(choice)
            step = min(choice.keys or self.keys, self.keys)
            if step == self.keys:  # float32 scores and their softmax, or that and its product with the values
                row = max(8 * step, 4 * step + 4 * padded)
            else:  # float32 scores, less their maximum, exponentials; and those of the keys before; sums and maxima
                row = 4 * max(3 * step, step + 3 * min(step, self.keys - step)) + 8 * padded
                row = 24 + max(row, 8 * step + 16 * padded)  # … or the values so far, scaled, those to add, the sum
            scores = self.batch * self.heads * queries * row
            in_order = copies or self.heads == 1
            copies += q * inner + (0 if in_order else 2 * k * inner)  # scaled queries; keys and values in order
        return copies + q * inner + scores


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How a network computes.

    Attributes:
        width: bytes per number.
        attention: how scores are computed.
        norm_workspace: what a group normalisation of so many numbers takes beside its input, in bytes, its result
            included; by default the result alone.
        reordered: group normalisation takes a map apart by channels, as CUDA's does, and what follows puts it together.
        donates: sums and activations are in place, and a map is free as soon as it is read.
        in_place_norms: norms write over donated maps.
        residual_fusion: sums are parts of products, and the input of a step of a transformer's block is free after it.
        folded: the text is folded into weights.
        fuses_gate: whether a gated layer of so many inputs and outputs gates what it multiplies.
        conv_workspace: numbers that a 3×3 convolution takes beside its input and result, for rows, inputs, outputs,
            height, width and whether the input is enlarged on the way; None where it takes none.
        upsample_workspace: the same of a convolution of an enlarged map that is never made, by the small map's sizes.
        channel_sums: bytes of the sums that come with a concatenated map, for rows, channels and area.
    """

    width: int = 4
    attention: ScoreBlocks = FUSED
    norm_workspace: Callable[[int], int] | None = None
    reordered: bool = False
    donates: bool = False
    in_place_norms: bool = False
    residual_fusion: bool = False
    folded: bool = False
    fuses_gate: Callable[[int, int], bool] | None = None
    conv_workspace: Callable[[int, int, int, int, int, bool], int | None] | None = None
    upsample_workspace: Callable[[int, int, int, int, int], int | None] | None = None
    channel_sums: Callable[[int, int, int], int] | None = None


@dataclass
class Walk:
    """What is alive on the way through a network, ``rows`` rows at once.

    sides: height and width of the maps of each area, which decide how a convolution works. timed: residual blocks add
    the time.
    """

    rows: int
    how: Arithmetic
    sides: Mapping[int, tuple[int, int]]
    timed: bool = False
    held: int = 0
    peak: int = 0

    def moment(self, *sizes: int) -> None:
        """Everything held and ``sizes`` are alive at once."""
        self.peak = max(self.peak, self.held + sum(sizes))

    def map(self, area: int, channels: int) -> int:
        """Bytes of a map or of tokens with ``area`` positions in each row."""
        return self.rows * area * channels * self.how.width

    def conv(self, area: int, x: int, out: int, enlarged: bool = False) -> int | None:
        """Bytes beside the input and the result of a 3×3 convolution; None where it takes none."""
        if self.how.conv_workspace is None:
            return None
        inputs, outputs = (size // self.map(area, 1) for size in (x, out))
        numbers = self.how.conv_workspace(self.rows, inputs, outputs, *self.sides[area], enlarged)
        return None if numbers is None else numbers * self.how.width

    def resnet(self, area: int, x: int, out: int, *, held: bool = False, donated: bool = False) -> None:
        """Norm and convolution, twice. held: its input is counted elsewhere. donated: nothing else needs its input."""
        beside = 0 if held else x
        if not self.how.donates:
            self._plain_resnet(area, beside, x, out)
            return
        if donated and self.how.in_place_norms and x != out:
            self.moment(x, 2 * out)  # normed, the shortcut, and what comes of the first convolution
            self.moment(3 * out)  # … which is normed, and what comes of the second
            return
        again = 2 if self.how.reordered else 1
        self.norm(beside, x)
        self.moment(beside, again * x, out, self.conv(area, x, out) or 0)
        self.norm(beside + out, out)
        self.moment(beside, again * out, out, self.conv(area, out, out) or 0)

    def _plain_resnet(self, area: int, beside: int, x: int, out: int) -> None:
        """Each result beside what it was made from, for which the block has a name until the next."""
        again = 2 if self.how.reordered else 1
        self.norm(beside, x)
        self.moment(beside, (1 + again) * x)  # the norm and its activation
        self.moment(beside, again * x, out, self.conv(area, x, out) or 0)
        before = 2 * out if self.timed else out  # the convolution's result; and with the time added
        self.norm(beside + before, out)
        self.moment(beside, (1 + again) * out, out, self.conv(area, out, out) or 0)

    def norm(self, beside: int, x: int) -> None:
        """Normalises ``x``, which is counted elsewhere."""
        if self.how.norm_workspace is not None:
            self.moment(beside, self.how.norm_workspace(x // self.how.width))
        else:
            self.moment(beside, 2 * x if self.how.reordered else x)

    def transformer(self, area: int, channels: int, heads: int, depth: int) -> None:
        """Normalised map, then blocks over its tokens ``t``; the tokens that entered a block live until it ends."""
        t, how = self.map(area, channels), self.how
        self.norm(2 * t, t)
        if depth:
            own = Attended.own(self.rows, heads, area, channels)
            text = replace(own, keys=TEXT)
            before = 2 * t if how.residual_fusion else 3 * t  # x, tokens; and those that entered the block
            self.moment(2 * t, 4 * t, own.scratch(how.attention, how.width))  # x, tokens; normed, q, k, v
            if how.folded:
                scores = self.map(area, heads * TEXT)
                self.moment(before, t, 2 * scores, t)  # normed; scores and their softmax; the result
            else:
                keys_values = 2 * self.map(TEXT, channels)
                self.moment(before, 2 * t, keys_values, text.scratch(how.attention, how.width))  # normed, q
            self.moment(2 * t, 6 * t)  # … and the projected result
            gate = 0 if how.fuses_gate is not None and how.fuses_gate(channels, 4 * channels) else 8 * t
            normed = 0 if how.residual_fusion and depth == 1 else t  # what another block follows has its own bias
            self.moment(before, normed, gate, (4 if how.donates else 8) * t)  # the gated layer and its gate
        self.moment(4 * t)

    def upsample(self, x: int, channels: int, area: int) -> None:
        """Twice the resolution, of ``x`` to a map with ``area`` positions in each row."""
        out, small = self.map(area, channels), x // self.map(1, channels)
        if self.how.upsample_workspace is not None and area == 4 * small:
            numbers = self.how.upsample_workspace(self.rows, channels, channels, 1, small)
            if numbers is not None:
                self.moment(x, out, numbers * self.how.width)
                return
        workspace = self.conv(area, out, out, enlarged=True)
        self.moment(x, *((2 * out,) if workspace is None else (out, workspace)))
