"""The two halves of the VAE: from pixels to latents, and from latents to pixels."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from russet.models.resnet import Downsample2D, ResnetBlock2D, ResnetStyle, Upsample2D
from russet.models.transformer import Attention, to_map, to_tokens
from russet.models.vae_config import VAEConfig

EPS = 1e-6  # what every norm of the VAE adds to the variance


class Encoder(nn.Module):
    """From pictures [B, C, H, W] to the mean and log-variance of latents [B, 2·Cz, h, w]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        style = ResnetStyle(config.norm_num_groups, EPS, config.act_fn)
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownEncoderBlock2D(a, b, config.layers_per_block, style, downsample=i < len(widths) - 1)
            for i, (a, b) in enumerate(pairwise((widths[0], *widths)))
        )
        self.mid_block = UNetMidBlock2D(widths[-1], style, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in self.layers:
            x = layer(x)
        x = F.silu(self.conv_norm_out(self.mid_block(x)))
        return self.conv_out(x)  # type: ignore[no-any-return]

    @property
    def layers(self) -> list[nn.Module]:
        """Residual blocks and changes of resolution in order: the way down as one list."""
        return [layer for block in self.down_blocks for part in block.children() for layer in part.children()]


class Decoder(nn.Module):
    """From latents [B, Cz, h, w] to pictures [B, C, H, W]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        style = ResnetStyle(config.norm_num_groups, EPS, config.act_fn)
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = UNetMidBlock2D(widths[0], style, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(a, b, config.layers_per_block + 1, style, upsample=i < len(widths) - 1)
            for i, (a, b) in enumerate(pairwise((widths[0], *widths)))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for layer in self.layers:
            x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # type: ignore[no-any-return]

    @property
    def layers(self) -> list[nn.Module]:
        """Residual blocks and changes of resolution in order: the way up as one list."""
        return [layer for block in self.up_blocks for part in block.children() for layer in part.children()]


class DownEncoderBlock2D(nn.Module):
    """Residual blocks, then half the resolution."""

    def __init__(self, inputs: int, outputs: int, layers: int, style: ResnetStyle, *, downsample: bool) -> None:
        super().__init__()
        self.resnets = resnets(inputs, outputs, layers, style)
        self.downsamplers = nn.ModuleList([Downsample2D(outputs, padding=0)] if downsample else [])


class UpDecoderBlock2D(nn.Module):
    """Residual blocks, then twice the resolution."""

    def __init__(self, inputs: int, outputs: int, layers: int, style: ResnetStyle, *, upsample: bool) -> None:
        super().__init__()
        self.resnets = resnets(inputs, outputs, layers, style)
        self.upsamplers = nn.ModuleList([Upsample2D(outputs)] if upsample else [])


class UNetMidBlock2D(nn.Module):
    """Two residual blocks with attention over all positions between them."""

    def __init__(self, channels: int, style: ResnetStyle, attention: bool) -> None:
        super().__init__()
        self.resnets = resnets(channels, channels, 2, style)
        self.attentions = nn.ModuleList([VAEAttention(channels, style.groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)  # type: ignore[no-any-return]


class VAEAttention(Attention):
    """One head of attention between the positions of a map [B, C, h, w], added to it."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, EPS)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        tokens = super().forward(to_tokens(self.group_norm(x)), context)
        return x + to_map(tokens, like=x)


def resnets(inputs: int, outputs: int, layers: int, style: ResnetStyle) -> nn.ModuleList:
    return nn.ModuleList(ResnetBlock2D(inputs if i == 0 else outputs, outputs, style) for i in range(layers))
