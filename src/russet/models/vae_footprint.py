"""The memory that a VAE takes: walks through its two halves."""

from __future__ import annotations

from russet.models.footprint import Arithmetic, Attended, Walk
from russet.models.tiny_vae import TinyVAEConfig
from russet.models.vae_config import VAEConfig


def decoder_peak(v: VAEConfig | TinyVAEConfig, rows: int, latents: tuple[int, int], how: Arithmetic) -> int:
    """Peak of decoding ``rows`` rows of latents ``(h, w)`` at once: mostly the last change of resolution."""
    walk = Walk(rows, how, sides(v, latents))
    if isinstance(v, TinyVAEConfig):
        return tiny_peak(walk, v.decoder_block_out_channels[0], latents[0] * latents[1] * v.pixels_per_latent**2)
    area = latents[0] * latents[1]
    x = walk.map(area, v.block_out_channels[-1])
    walk.held = walk.map(area, v.latent_channels) + x
    middle(walk, v, area)
    walk.held -= x
    for level in reversed(range(len(v.block_out_channels))):
        out = walk.map(area, v.block_out_channels[level])
        walk.resnet(area, x, out, donated=True)
        walk.resnet(area, out, out)
        if level:
            x, area = 4 * out, 4 * area
            walk.upsample(out, v.block_out_channels[level], area)
    if not how.donates:
        walk.moment(3 * walk.map(area, v.block_out_channels[0]))  # the last map, its norm and its activation
    return walk.peak


def encoder_peak(v: VAEConfig | TinyVAEConfig, rows: int, latents: tuple[int, int], how: Arithmetic) -> int:
    """Peak of encoding pictures of ``rows`` rows of latents ``(h, w)`` at once: mostly its first level."""
    walk = Walk(rows, how, sides(v, latents))
    area = latents[0] * latents[1] * v.pixels_per_latent**2
    if isinstance(v, TinyVAEConfig):
        walk.held = walk.map(area, 3)  # the pictures from 0 to 1
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


def sides(v: VAEConfig | TinyVAEConfig, latents: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """Area → height and width of the maps at each resolution."""
    height, width = latents
    scales = [1 << level for level in range(v.pixels_per_latent.bit_length())]
    return {height * width * scale * scale: (height * scale, width * scale) for scale in scales}


def middle(walk: Walk, v: VAEConfig, area: int) -> None:
    """A residual block, one head of attention, a residual block, beside their input, which is held already."""
    x = walk.map(area, v.block_out_channels[-1])
    if walk.how.donates:
        walk.norm(x, x)
    else:
        walk.resnet(area, x, x, held=True)
    if v.mid_block_add_attention:
        call = Attended.own(walk.rows, 1, area, v.block_out_channels[-1])
        walk.moment(5 * x, call.scratch(walk.how.attention, walk.how.width))  # x; normed, q, k, v
        walk.moment(7 * x)  # … the result, and the same projected
    walk.resnet(area, x, x)


def tiny_peak(walk: Walk, channels: int, area: int) -> int:
    """Both ways of a tiny autoencoder are the widest at full size: a block's input, and a convolution's two sides."""
    x = walk.map(area, channels)
    walk.moment(walk.map(area, 3), 3 * x)
    return walk.peak
