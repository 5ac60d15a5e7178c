"""How many parameters a network has, counted from its config: for models that are not loaded. Exact."""

from __future__ import annotations

from russet.models.clip_text import CLIPTextConfig
from russet.models.clip_vision import CLIPVisionConfig
from russet.models.safety_checker import SafetyCheckerConfig
from russet.models.tiny_vae import TinyVAEConfig
from russet.models.unet_config import StageConfig, UNetConfig
from russet.models.vae_config import VAEConfig


def linear(width: int, out: int, bias: bool = True) -> int:
    return width * out + (out if bias else 0)


def conv(channels: int, out: int, kernel: int = 3) -> int:
    return kernel * kernel * channels * out + out


def norm(width: int) -> int:
    return 2 * width


def resnet(channels: int, out: int, time: int = 0) -> int:
    shortcut = conv(channels, out, 1) if channels != out else 0
    return norm(channels) + conv(channels, out) + norm(out) + conv(out, out) + shortcut + time


def transformer(width: int, depth: int, context: int, only_cross: bool) -> int:
    """Normalisation and projections around ``depth`` blocks of self-attention, cross-attention and a gated MLP."""
    cross = width * width + 2 * context * width + linear(width, width)
    own = cross if only_cross else 3 * width * width + linear(width, width)
    mlp = linear(width, 8 * width) + linear(4 * width, width)
    return norm(width) + 2 * linear(width, width) + depth * (3 * norm(width) + own + cross + mlp)


def unet(config: UNetConfig) -> int:
    width, time = config.block_out_channels[0], config.time_features
    scale_shift = 2 if config.resnet_time_scale_shift == "scale_shift" else 1

    def stage(one: StageConfig) -> int:
        if one.resampling == "down":
            return conv(one.channels, one.channels)
        found = resnet(one.inputs, one.channels, linear(time, scale_shift * one.channels))
        if one.depth is not None:
            found += transformer(one.channels, one.depth, one.context, one.only_cross)
        return found + (conv(one.channels, one.channels) if one.resampling == "up" else 0)

    ends = conv(config.in_channels, width, config.conv_in_kernel) + norm(width)
    ends += conv(width, config.out_channels, config.conv_out_kernel)
    return ends + embeddings(config, width, time) + sum(map(stage, config.stages))


def embeddings(config: UNetConfig, width: int, time: int) -> int:
    """Those of the timestep, LCM's guidance scale, a class, and XL's pooled text and sizes."""
    found = linear(width, time) + linear(time, time) + (config.time_cond_proj_dim or 0) * width
    projected = config.projection_class_embeddings_input_dim or 0
    if config.class_embed_type is not None:
        found += linear(width if config.class_embed_type == "timestep" else projected, time) + linear(time, time)
    elif config.num_class_embeds is not None:
        found += config.num_class_embeds * time
    if config.addition_embed_type == "text_time":
        found += linear(projected, time) + linear(time, time)
    return found


def vae(config: VAEConfig | TinyVAEConfig) -> int:
    return tiny_vae(config) if isinstance(config, TinyVAEConfig) else usual_vae(config)


def tiny_vae(config: TinyVAEConfig) -> int:
    """Blocks of three convolutions, and one convolution without a bias from each level to the next, on both ways."""
    found = 0
    for widths, blocks, inputs, outputs in (
        (config.encoder_block_out_channels, config.num_encoder_blocks, config.in_channels, config.latent_channels),
        (config.decoder_block_out_channels, config.num_decoder_blocks, config.latent_channels, config.out_channels),
    ):
        width, changes = widths[0], len(widths) - 1
        found += sum(blocks) * 3 * conv(width, width) + changes * (conv(width, width) - width)
        found += conv(inputs, width) + conv(width, outputs)
    return found


def usual_vae(config: VAEConfig) -> int:
    channels, latent = config.block_out_channels, config.latent_channels
    first, last, levels = channels[0], channels[-1], len(channels)
    middle = 2 * resnet(last, last) + (norm(last) + 4 * linear(last, last) if config.mid_block_add_attention else 0)
    encoder = conv(config.in_channels, first) + middle + norm(last) + conv(last, 2 * latent)
    decoder = conv(latent, last) + middle + norm(first) + conv(first, config.out_channels)
    width_in, width_out = first, last
    for level in range(levels):
        down, up = channels[level], channels[levels - 1 - level]
        encoder += resnet(width_in, down) + (config.layers_per_block - 1) * resnet(down, down)
        decoder += resnet(width_out, up) + config.layers_per_block * resnet(up, up)
        if level < levels - 1:
            encoder += conv(down, down)
            decoder += conv(up, up)
        width_in, width_out = down, up
    quant = conv(2 * latent, 2 * latent, 1) if config.use_quant_conv else 0
    return encoder + decoder + quant + (conv(latent, latent, 1) if config.use_post_quant_conv else 0)


def tower(config: CLIPTextConfig | CLIPVisionConfig) -> int:
    """The layers of a CLIP tower and the norm behind them."""
    width, hidden = config.hidden_size, config.intermediate_size
    layer = 4 * linear(width, width) + linear(width, hidden) + linear(hidden, width) + 2 * norm(width)
    return config.num_hidden_layers * layer + norm(width)


def text_encoder(config: CLIPTextConfig, projected: bool = False) -> int:
    """``projected``: it is a CLIPTextModelWithProjection."""
    entry = (config.vocab_size + config.max_position_embeddings) * config.hidden_size
    return entry + tower(config) + (config.projection_dim * config.hidden_size if projected else 0)


def safety_checker(config: SafetyCheckerConfig) -> int:
    """The vision tower and the embeddings and thresholds of 17 concepts and 3 special ones."""
    vision, width = config.vision, config.vision.hidden_size
    entry = (
        vision.num_channels * vision.patch_size**2 * width
        + width
        + ((vision.image_size // vision.patch_size) ** 2 + 1) * width
        + norm(width)
    )
    return entry + tower(vision) + config.projection_dim * width + 20 * config.projection_dim + 20
