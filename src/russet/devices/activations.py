"""Bytes that a network's activations take at their peak, its parameters not counted, by arithmetic over its shapes.

Each function says what is alive at once in the widest moment of one part. ``E`` below is bytes per number.
"""

from __future__ import annotations

from dataclasses import dataclass

from russet.devices.choices import AttentionChoice
from russet.devices.sizes import TransformerSizes, UNetSizes, VAESizes


@dataclass(frozen=True, kw_only=True)
class Attended:
    """One attention call: ``batch`` rows of ``heads`` heads of ``dim`` numbers, ``queries`` tokens against ``keys``."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int

    def scores(self, choice: AttentionChoice) -> int:
        """Numbers in the largest score tensor; 0 where none is built."""
        matrices, queries, keys = self.batch * self.heads, self.queries, self.keys
        if choice.kind == "fused":
            return 0
        if choice.kind == "sliced":
            return min(choice.rows or 1, matrices) * queries * keys
        return matrices * min(choice.queries or queries, queries) * min(choice.keys or keys, keys)

    def scratch(self, choice: AttentionChoice, width: int) -> int:
        """Bytes beside queries, keys, values and the result: scores and probabilities, or padded copies."""
        padded = next((size for size in choice.pad if size >= self.dim), self.dim)
        copies = (
            self.batch * self.heads * (2 * self.queries + 2 * self.keys) * padded * width if padded > self.dim else 0
        )
        wide = 4 if choice.upcast or choice.kind == "chunked" else width
        return copies + 2 * self.scores(choice) * wide


def unet_peak(u: UNetSizes, rows: int, latents: tuple[int, int], width: int, choice: AttentionChoice) -> int:
    """Peak of one UNet call on ``rows`` rows of latents ``(h, w)`` with ``width`` bytes a number."""
    height, breadth = latents
    held, peak, channels = 0, 0, u.channels[0]
    skips = []

    def area(level: int) -> int:
        return rows * -(-height // (1 << level)) * -(-breadth // (1 << level))

    def block(level: int, entering: int, leaving: int, depth: int) -> int:
        tokens = area(level)
        inner = resnet_peak(tokens, entering, leaving) * width
        if depth:
            inner = max(inner, transformer_peak(u, rows, tokens, leaving, u.heads[level], width, choice))
        return tokens * entering * width + inner

    def skip(level: int, numbers: int) -> None:
        nonlocal held
        held += area(level) * numbers * width
        skips.append((level, numbers))

    skip(0, channels)
    for level, out in enumerate(u.channels):
        for _ in range(u.layers[level]):
            peak = max(peak, held + block(level, channels, out, u.depth[level]))
            channels = out
            skip(level, out)
        if level < len(u.channels) - 1:
            skip(level + 1, out)
    bottom = len(u.channels) - 1
    peak = max(peak, held + block(bottom, channels, channels, u.mid_depth))
    for level in reversed(range(len(u.channels))):
        out = u.channels[level]
        for _ in range(u.layers[level] + 1):
            place, numbers = skips.pop()
            peak = max(
                peak, held + area(level) * channels * width + block(level, channels + numbers, out, u.up_depth[level])
            )
            held -= area(place) * numbers * width
            channels = out
        if level:
            peak = max(peak, held + (2 * area(level - 1) + area(level)) * out * width)
    return peak


def resnet_peak(area: int, entering: int, leaving: int) -> int:
    """Numbers alive in a residual block beside its input."""
    return area * max(2 * entering, entering + leaving, 3 * leaving)


def transformer_peak(
    u: UNetSizes, rows: int, tokens: int, channels: int, heads: int, width: int, choice: AttentionChoice
) -> int:
    """Bytes alive in a spatial transformer beside its input: the wider of self-attention and gated MLP."""
    count = tokens // rows
    attended = Attended(batch=rows, heads=heads, queries=count, keys=count, dim=channels // heads)
    attention = 6 * tokens * channels * width + attended.scratch(choice, width)
    mlp = (2 + 8 + 4 + 4) * tokens * channels * width
    return max(attention, mlp)


def vae_peak(v: VAESizes, images: int, latents: tuple[int, int], width: int, choice: AttentionChoice) -> int:
    """Peak of decoding (encoding is its mirror) ``images`` latents at once."""
    area = images * latents[0] * latents[1]
    last = v.channels[-1]
    attended = Attended(batch=images, heads=1, queries=area // images, keys=area // images, dim=last)
    peak = 6 * area * last * width + attended.scratch(choice, width)
    entering = last
    for level in reversed(range(len(v.channels))):
        out = v.channels[level]
        peak = max(peak, (area * entering + resnet_peak(area, entering, out)) * width)
        entering = out
        if level:
            area *= 4
            peak = max(peak, (2 * area + area // 4) * out * width)
    return peak


def tower_peak(t: TransformerSizes, batch: int, width: int) -> int:
    """Peak of a CLIP tower on ``batch`` sequences, all hidden states kept."""
    tokens = batch * t.tokens
    scores = 2 * batch * t.heads * t.tokens**2 * 4
    return tokens * width * (t.width * (t.layers + 6) + 2 * t.hidden) + scores
