"""Bytes that a network's activations take at their peak, its parameters not counted, by walking over its shapes.

A walk follows the networks of ``russet.models`` and notes what is alive at once at the moments that can be the widest.
Maps and tokens are counted in bytes; ``x`` is always what a block was given, which its caller holds until it returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from russet.backends import norm_heuristics, upsample_heuristics
from russet.backends.cpu.winograd_heuristics import pays, room
from russet.backends.gemm_heuristics import gates
from russet.backends.norm_heuristics import at_once
from russet.models.clip_text import CLIPTextConfig
from russet.models.clip_vision import CLIPVisionConfig
from russet.models.tiny_vae import TinyVAEConfig
from russet.models.unet_config import Stage, UNetConfig
from russet.models.vae_config import VAEConfig
from russet.planning.plan_types import TEXT, AttentionChoice

FUSED = AttentionChoice()


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

    def scores(self, choice: AttentionChoice) -> int:
        """Numbers in the largest score tensor; 0 where none is built."""
        matrices = self.batch * self.heads
        if choice.kind == "fused":
            return 0
        if choice.kind == "sliced":
            return min(choice.rows or 1, matrices) * self.queries * self.keys
        return matrices * self.rows(choice) * min(choice.keys or self.keys, self.keys)

    def rows(self, choice: AttentionChoice) -> int:
        """Queries of each matrix that chunked attention takes at a time."""
        rows = choice.queries or self.queries
        if choice.keys is None or choice.keys >= self.keys:
            rows = max(rows, rows * self.queries // self.keys)
        return min(rows, self.queries)

    def scratch(self, choice: AttentionChoice, width: int) -> int:
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
        if choice.kind == "sliced":  # the scaled queries, scores and their softmax
            scores = 2 * scores * inner + q * inner // 2
        elif choice.kind == "chunked":
            queries = self.rows(choice)
            step = min(choice.keys or self.keys, self.keys)
            if step == self.keys:  # float32 scores and their softmax
                row = 8 * step
            else:  # float32 scores, less their maximum, exponentials; and those of the keys before
                row = 4 * max(3 * step, step + 3 * min(step, self.keys - step)) + 8 * padded
            scores = self.batch * self.heads * queries * row
            in_order = copies or self.heads == 1
            copies += q * inner + (0 if in_order else 2 * k * inner)  # scaled queries; keys and values in order
        return copies + q * inner + scores


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How a network computes.

    width: bytes per number. composed: GroupNorm is composed of plain operations. reordered: GroupNorm takes a map apart
    by channels, as CUDA's does, and what follows puts it together again. gated: gated layers gate what they make.
    summed: sums are parts of products, and what went into a step of a transformer's block is free after it. absorbed:
    the text is multiplied into weights. winograd: 3×3 convolutions are computed in Winograd's way, where it pays.
    transposed: those of doubled maps are transposed ones, where it pays. reuses: norms take the place of spare maps.
    """

    width: int = 4
    attention: AttentionChoice = FUSED
    composed: bool = False
    reordered: bool = False
    gated: bool = False
    summed: bool = False
    absorbed: bool = False
    winograd: bool = False
    transposed: bool = False
    reuses: bool = False


@dataclass
class Walk:
    """What is alive on the way through a network, ``rows`` rows at once."""

    rows: int
    how: Arithmetic
    held: int = 0
    peak: int = 0

    def moment(self, *sizes: int) -> None:
        """Everything held and ``sizes`` are alive at once."""
        self.peak = max(self.peak, self.held + sum(sizes))

    def map(self, area: int, channels: int) -> int:
        """Bytes of a map or of tokens with ``area`` positions in each row."""
        return self.rows * area * channels * self.how.width

    def filtering(self, area: int, x: int, out: int, doubled: bool = False) -> int | None:
        """Bytes beside the map and the result of a 3×3 convolution in Winograd's way; None where it is not taken.

        Areas are taken as squares, which is as near as the rest of a tile at the edge.
        """
        side, (inputs, outputs) = math.isqrt(area), (size // (self.rows * area * self.how.width) for size in (x, out))
        sizes = self.rows, inputs, outputs, side, side
        taken = self.how.winograd and pays(*sizes)
        return room(*sizes, doubled=doubled).size * self.how.width if taken else None

    def resnet(self, area: int, x: int, out: int, held: bool = False, spare: bool = False) -> None:
        """norm and convolution, twice; activations and sums work in place.

        held: its input is counted elsewhere. spare: nothing else needs its input, which is free once it is convolved.
        """
        if spare and self.how.reuses and x != out:
            self.moment(x, 2 * out)  # normed, what passes by, and what comes of the first convolution
            self.moment(3 * out)  # … which is normed, and what comes of the second
            return
        beside = 0 if held else x
        again = 2 if self.how.reordered else 1
        self.norm(beside, x)
        self.moment(beside, again * x, out, self.filtering(area, x, out) or 0)
        self.norm(beside + out, out)
        self.moment(beside, again * out, out, self.filtering(area, out, out) or 0)

    def sums(self, area: int, x: int) -> int:
        """Bytes of the sums that come with a joined map, where kernels of ours join."""
        return norm_heuristics.sums(self.rows, x // self.map(area, 1), area) if self.how.reuses else 0

    def norm(self, beside: int, x: int) -> None:
        """Normalises ``x``, which is counted elsewhere. A composed norm holds two float32 maps, of a large map one."""
        numbers = x // self.how.width
        if self.how.composed:
            self.moment(beside, (8 if at_once(numbers) else 4) * numbers)
        else:
            self.moment(beside, 2 * x if self.how.reordered else x)

    def transformer(self, area: int, channels: int, heads: int, depth: int) -> None:
        """Normalised map, then blocks over its tokens ``t``; the tokens that entered a block live until it ends."""
        t = self.map(area, channels)
        self.norm(2 * t, t)
        if depth:
            own = Attended.own(self.rows, heads, area, channels)
            text = replace(own, keys=TEXT)
            before = 2 * t if self.how.summed else 3 * t  # x, tokens; and those that entered the block
            self.moment(2 * t, 4 * t, own.scratch(self.how.attention, self.how.width))  # x, tokens; normed, q, k, v
            if self.how.absorbed:
                scores = self.map(area, heads * TEXT)
                self.moment(before, t, 2 * scores, t)  # normed; scores and their softmax; the result
            else:
                self.moment(before, 2 * t, text.scratch(self.how.attention, self.how.width))  # normed, q
            self.moment(2 * t, 6 * t)  # … and the projected result
            gate = 0 if self.how.gated and gates(channels, 4 * channels) else 8 * t
            normed = 0 if self.how.summed and depth == 1 else t  # what another block follows has its own bias
            self.moment(before, normed, gate, 4 * t)  # the gated layer and its gate
        self.moment(4 * t)

    def attention(self, stage: Stage, areas: list[int]) -> None:
        """The transformer behind a stage's residual block, where there is one."""
        if stage.depth is not None:
            self.transformer(areas[stage.level], stage.channels, stage.heads, stage.depth)

    def upsample(self, x: int, channels: int, area: int) -> None:
        """Twice the resolution, of ``x`` to a map with ``area`` positions in each row."""
        out = self.map(area, channels)
        small = x // self.map(1, channels)
        sizes = self.rows, channels, channels, 1, small
        if self.how.transposed and area == 4 * small and upsample_heuristics.pays(*sizes):
            self.moment(x, out, upsample_heuristics.room(channels, channels) * self.how.width)
            return
        filtering = self.filtering(area, out, out, doubled=True)
        self.moment(x, *((2 * out,) if filtering is None else (out, filtering)))


def unet_peak(u: UNetConfig, rows: int, latents: tuple[int, int], how: Arithmetic) -> int:
    """Peak of one UNet call on ``rows`` rows of latents ``(h, w)``."""
    walk = Walk(rows, how)
    areas = [-(-latents[0] // (1 << n)) * -(-latents[1] // (1 << n)) for n in range(len(u.block_out_channels))]
    skips = [walk.map(areas[0], u.block_out_channels[0])]
    walk.held = walk.map(areas[0], u.in_channels) + skips[0]
    for stage in u.input_stages:  # the maps of all of them are held
        if stage.resampling == "down":
            out = walk.map(areas[stage.level + 1], stage.channels)
        else:
            out = walk.map(areas[stage.level], stage.channels)
            walk.resnet(areas[stage.level], skips[-1], out, held=True)
            walk.attention(stage, areas)
        walk.held += out
        skips.append(out)
    x = skips[-1]
    for place, stage in enumerate(u.mid_stages):
        walk.resnet(areas[stage.level], x, x, held=place == 0)
        walk.held += 0 if place else x  # what comes of it is held until the end
        walk.attention(stage, areas)
    way_up(walk, u, areas, skips, x)
    return walk.peak


def way_up(walk: Walk, u: UNetConfig, areas: list[int], skips: list[int], x: int) -> None:
    """Each residual block sees one more of the maps, joined to ``x``."""
    middle = len(u.mid_stages) > 0
    for place, stage in enumerate(u.output_stages):
        area, skip = areas[stage.level], skips.pop()
        joined, out = x + skip, walk.map(area, stage.channels)
        walk.moment(0 if place == 0 else x, joined, walk.sums(area, joined))  # the first is held already
        walk.held -= skip if middle or place else 0  # without a middle it is what the way up begins with
        walk.resnet(area, joined, out, spare=True)
        walk.attention(stage, areas)
        x = out
        if stage.resampling == "up":
            walk.upsample(x, stage.channels, areas[stage.level - 1])
            x = walk.map(areas[stage.level - 1], stage.channels)
    walk.norm(x, x)


def decoder_peak(v: VAEConfig | TinyVAEConfig, rows: int, latents: tuple[int, int], how: Arithmetic) -> int:
    """Peak of decoding ``rows`` rows of latents ``(h, w)`` at once: mostly the last change of resolution."""
    walk = Walk(rows, how)
    if isinstance(v, TinyVAEConfig):
        return tiny_peak(walk, v.decoder_block_out_channels[0], latents[0] * latents[1] * v.pixels_per_latent**2)
    area = latents[0] * latents[1]
    x = walk.map(area, v.block_out_channels[-1])
    walk.held = walk.map(area, v.latent_channels) + x
    middle(walk, v, area)
    walk.held -= x
    for level in reversed(range(len(v.block_out_channels))):
        out = walk.map(area, v.block_out_channels[level])
        walk.resnet(area, x, out, spare=True)
        walk.resnet(area, out, out)
        if level:
            x, area = 4 * out, 4 * area
            walk.upsample(out, v.block_out_channels[level], area)
    return walk.peak


def encoder_peak(v: VAEConfig | TinyVAEConfig, rows: int, latents: tuple[int, int], how: Arithmetic) -> int:
    """Peak of encoding pictures of ``rows`` rows of latents ``(h, w)`` at once: mostly its first level."""
    walk = Walk(rows, how)
    area = latents[0] * latents[1] * v.pixels_per_latent**2
    if isinstance(v, TinyVAEConfig):
        return tiny_peak(walk, v.encoder_block_out_channels[0], area)
    walk.held = walk.map(area, 3)
    x = walk.map(area, v.block_out_channels[0])
    for level, channels in enumerate(v.block_out_channels):
        out = walk.map(area, channels)
        walk.resnet(area, x, out)
        if v.layers_per_block > 1:
            walk.resnet(area, out, out)
        if level < len(v.block_out_channels) - 1:
            walk.moment(2 * out, out // 4)  # padded by a row and a column first
            x, area = out // 4, area // 4
        else:
            x = out
    walk.held += x
    middle(walk, v, area)
    return walk.peak


def tiny_peak(walk: Walk, channels: int, area: int) -> int:
    """Both ways of a tiny autoencoder are the widest at full size: a block's input, and a convolution's two sides."""
    x = walk.map(area, channels)
    walk.moment(walk.map(area, 3), 3 * x)
    return walk.peak


def middle(walk: Walk, v: VAEConfig, area: int) -> None:
    """A residual block, one head of attention, a residual block, beside their input, which is held already."""
    x = walk.map(area, v.block_out_channels[-1])
    walk.norm(x, x)
    if v.mid_block_add_attention:
        call = Attended.own(walk.rows, 1, area, v.block_out_channels[-1])
        walk.moment(5 * x, call.scratch(walk.how.attention, walk.how.width))  # x; normed, q, k, v
        walk.moment(7 * x)  # … the result, and the same projected
    walk.resnet(area, x, x)


def tower_peak(t: CLIPTextConfig | CLIPVisionConfig, rows: int, how: Arithmetic) -> int:
    """Peak of a CLIP tower on ``rows`` sequences: all layers' outputs are kept, and the last one's work beside them."""
    walk = Walk(rows, how)
    tokens = t.max_position_embeddings if isinstance(t, CLIPTextConfig) else (t.image_size // t.patch_size) ** 2 + 1
    x = walk.map(tokens, t.hidden_size)
    walk.held = (t.num_hidden_layers + 1) * x
    call = Attended.own(rows, t.num_attention_heads, tokens, t.hidden_size)
    walk.moment(4 * x, call.scratch(how.attention, how.width))
    walk.moment(x, 3 * walk.map(tokens, t.intermediate_size))
    return walk.peak
