"""How many parameters a network has, by arithmetic from its shape: exact for the checkpoints' architectures."""

from __future__ import annotations

from collections.abc import Mapping

from russet.planning.workload import TransformerSizes, UNetSizes, VAESizes, Workload


def counts(workload: Workload) -> Mapping[str, int]:
    """Parameters of each component (both text encoders together); what ``workload.parameters`` says wins."""
    return {
        "text_encoder": sum(transformer(tower) for tower in workload.text),
        "unet": unet(workload.unet),
        "vae": vae(workload.vae),
        "safety_checker": safety_checker(workload.vision) if workload.vision else 0,
        **workload.parameters,
    }


def largest_layers(workload: Workload) -> Mapping[str, int]:
    """Parameters of the largest single layer of each component."""
    bottom, widest = workload.unet.channels[-1], max(workload.vae.channels)
    return {
        "text_encoder": max((tower.vocabulary * tower.width for tower in workload.text), default=0),
        "unet": conv(2 * bottom, bottom),
        "vae": conv(widest, widest),
        "safety_checker": linear(workload.vision.width, workload.vision.hidden) if workload.vision else 0,
    }


def linear(width: int, out: int, bias: bool = True) -> int:
    return width * out + (out if bias else 0)


def conv(channels: int, out: int, kernel: int = 3) -> int:
    return kernel * kernel * channels * out + out


def norm(width: int) -> int:
    return 2 * width


def resnet(channels: int, out: int, time: int = 0) -> int:
    shortcut = conv(channels, out, 1) if channels != out else 0
    timed = linear(time, out) if time else 0
    return norm(channels) + conv(channels, out) + timed + norm(out) + conv(out, out) + shortcut


def spatial_transformer(width: int, depth: int, context: int) -> int:
    """Normalisation and projections around ``depth`` blocks of self-attention, cross-attention and a gated MLP."""
    attention = 3 * width * width + linear(width, width)
    cross = width * width + 2 * context * width + linear(width, width)
    mlp = linear(width, 8 * width) + linear(4 * width, width)
    return norm(width) + 2 * linear(width, width) + depth * (3 * norm(width) + attention + cross + mlp)


def unet(u: UNetSizes) -> int:
    base = u.channels[0]
    time = 4 * base
    total = (
        linear(base, time) + linear(time, time) + conv(u.in_channels, base) + norm(base) + conv(base, u.out_channels)
    )
    total += linear(u.added, time) + linear(time, time) if u.added else 0

    def block(level: int, width: int, out: int, depth: int | None) -> int:
        attention = 0 if depth is None else spatial_transformer(out, depth, u.context[level])
        return resnet(width, out, time) + attention

    total += sum(block(level, width, u.channels[level], depth) for level, width, depth in u.blocks)
    changes = [*u.channels[:-1], *u.channels[1:]]  # of resolution, on the way down and up
    return total + sum(conv(width, width) for width in changes)


def vae(v: VAESizes) -> int:
    return tiny_vae(v) if v.blocks else usual_vae(v)


def tiny_vae(v: VAESizes) -> int:
    """Blocks of three convolutions, and one convolution without a bias from each level to the next, on both ways."""
    width, changes = v.channels[0], len(v.channels) - 1
    blocks = sum(map(sum, v.blocks)) * 3 * conv(width, width)
    ends = conv(3, width) + conv(width, v.latent) + conv(v.latent, width) + conv(width, 3)
    return blocks + 2 * changes * (conv(width, width) - width) + ends


def usual_vae(v: VAESizes) -> int:
    first, last, levels = v.channels[0], v.channels[-1], len(v.channels)
    middle = 2 * resnet(last, last) + norm(last) + 4 * linear(last, last)
    encoder = conv(3, first) + middle + norm(last) + conv(last, 2 * v.latent)
    decoder = conv(v.latent, last) + middle + norm(first) + conv(first, 3)
    width_in, width_out = first, last
    for level in range(levels):
        down, up = v.channels[level], v.channels[levels - 1 - level]
        encoder += resnet(width_in, down) + (v.layers - 1) * resnet(down, down)
        decoder += resnet(width_out, up) + v.layers * resnet(up, up)
        if level < levels - 1:
            encoder += conv(down, down)
            decoder += conv(up, up)
        width_in, width_out = down, up
    return encoder + decoder + conv(2 * v.latent, 2 * v.latent, 1) + conv(v.latent, v.latent, 1)


def transformer(t: TransformerSizes) -> int:
    layer = 4 * linear(t.width, t.width) + linear(t.width, t.hidden) + linear(t.hidden, t.width) + 2 * norm(t.width)
    ends = norm(t.width) * (2 if t.patch else 1) + t.projection * t.width
    entry = 3 * t.patch**2 * t.width + t.width if t.patch else t.vocabulary * t.width
    return entry + t.tokens * t.width + t.layers * layer + ends


def safety_checker(t: TransformerSizes) -> int:
    """The vision tower and the embeddings and thresholds of 17 concepts and 3 special ones."""
    return transformer(t) + 20 * t.projection + 20
