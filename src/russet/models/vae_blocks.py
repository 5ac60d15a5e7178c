"""The two halves of the VAE: from pixels to latents, and from latents to pixels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor, nn

from russet.backends.ops import convolution, hooked
from russet.models.activations import silu
from russet.models.base import Stepping
from russet.models.resnet import Downsample, Resnet, ResnetStyle, Upsample
from russet.models.spare import Spare
from russet.models.text import Text
from russet.models.transformer import MultiHeadAttention, to_map, to_tokens
from russet.models.vae_config import VAEConfig

EPS = 1e-6  # what every norm of the VAE adds to the variance


class Encoder(Stepping):
    """From pictures [B, C, H, W] to the mean and log-variance of latents [B, 2·Cz, h, w]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        style = ResnetStyle(config.norm_num_groups, EPS, config.act_fn)
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownStage(a, b, config.layers_per_block, style, downsample=i < len(widths) - 1)
            for i, (a, b) in enumerate(pairwise((widths[0], *widths)))
        )
        self.mid_block = Middle(widths[-1], style, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = convolution(self.steps, x, self.conv_in)
        for layer in layers_of(self.down_blocks):
            x = layer(x)
        x = self.steps.normed(self.mid_block(x), self.conv_norm_out, silu)
        return convolution(self.steps, x, self.conv_out)


class Decoder(Stepping):
    """From latents [B, Cz, h, w] to pictures [B, C, H, W]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        style = ResnetStyle(config.norm_num_groups, EPS, config.act_fn)
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], style, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpStage(a, b, config.layers_per_block + 1, style, upsample=i < len(widths) - 1)
            for i, (a, b) in enumerate(pairwise((widths[0], *widths)))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(convolution(self.steps, z, self.conv_in))
        watched = any(hooked(module) for module in self.modules())  # by one who may keep what a layer gave
        for layer in layers_of(self.up_blocks):
            if isinstance(layer, Resnet) and not watched:
                given = Spare(x)
                del x
                x = given.into(layer)
            else:
                x = layer(x)
        return convolution(self.steps, self.steps.normed(x, self.conv_norm_out, silu), self.conv_out)


def layers_of(stages: nn.ModuleList) -> Iterator[nn.Module]:
    """The layers of all stages, for a loop that lets go of each layer's input: a stage's is large."""
    for stage in stages:
        assert isinstance(stage, (DownStage, UpStage))
        yield from stage.layers


class DownStage(nn.Module):
    """Residual blocks, then half the resolution."""

    def __init__(self, inputs: int, outputs: int, layers: int, style: ResnetStyle, *, downsample: bool) -> None:
        super().__init__()
        self.resnets = resnets(inputs, outputs, layers, style)
        self.downsamplers = nn.ModuleList([Downsample(outputs, padding=0)] if downsample else [])

    @property
    def layers(self) -> Iterator[nn.Module]:
        yield from (*self.resnets, *self.downsamplers)


class UpStage(nn.Module):
    """Residual blocks, then twice the resolution."""

    def __init__(self, inputs: int, outputs: int, layers: int, style: ResnetStyle, *, upsample: bool) -> None:
        super().__init__()
        self.resnets = resnets(inputs, outputs, layers, style)
        self.upsamplers = nn.ModuleList([Upsample(outputs)] if upsample else [])

    @property
    def layers(self) -> Iterator[nn.Module]:
        yield from (*self.resnets, *self.upsamplers)


class Middle(nn.Module):
    """Two residual blocks with attention over all positions between them."""

    def __init__(self, channels: int, style: ResnetStyle, attention: bool) -> None:
        super().__init__()
        self.resnets = resnets(channels, channels, 2, style)
        self.attentions = nn.ModuleList([MapAttention(channels, style.groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)  # type: ignore[no-any-return]


class MapAttention(MultiHeadAttention, Stepping):
    """One head of attention between the positions of a map [B, C, h, w], added to it."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, EPS)

    def forward(self, x: Tensor, text: Text | None = None) -> Tensor:
        tokens = super().forward(to_tokens(self.steps.normed(x, self.group_norm)), text)
        return x + to_map(tokens, like=x)


def resnets(inputs: int, outputs: int, layers: int, style: ResnetStyle) -> nn.ModuleList:
    return nn.ModuleList(Resnet(inputs if i == 0 else outputs, outputs, style) for i in range(layers))
