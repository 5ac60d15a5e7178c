"""The UNet's levels, under the names of the checkpoints, and the flat list of stages that they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from russet.models.resnet import Downsample2D, ResnetBlock2D, ResnetStyle, Upsample2D
from russet.models.transformer import Transformer2DModel
from russet.models.unet_config import Level, UNetConfig


@dataclass(frozen=True)
class Stage:
    """One entry of the UNet's flat lists: a residual block, the transformer after it, and a change of resolution."""

    resnet: nn.Module | None = None
    attention: nn.Module | None = None
    downsample: nn.Module | None = None
    upsample: nn.Module | None = None

    def __call__(self, x: Tensor, emb: Tensor, context: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """From a map [B, C, h, w]; ``size`` is what ``upsample`` enlarges it to, by default twice its own."""
        if self.resnet is not None:
            x = self.resnet(x, emb)
        if self.attention is not None:
            x = self.attention(x, context)
        if self.downsample is not None:
            x = self.downsample(x)
        return x if self.upsample is None else self.upsample(x, size)


class DownBlock2D(nn.Module):
    """A level on the way down: residual blocks, then half the resolution. Each stage's output is a skip connection."""

    def __init__(self, inputs: int, level: Level, config: UNetConfig, downsample: bool) -> None:
        super().__init__()
        style = resnet_style(config)
        widths = [inputs, *[level.channels] * len(level.depths)]
        self.resnets = nn.ModuleList(ResnetBlock2D(a, b, style) for a, b in pairwise(widths))
        self.attentions = transformers(level, config)
        self.downsamplers = nn.ModuleList(
            [Downsample2D(level.channels, config.downsample_padding)] if downsample else []
        )

    @property
    def stages(self) -> Iterator[Stage]:
        for i, resnet in enumerate(self.resnets):
            yield Stage(resnet, self.attentions[i] if len(self.attentions) else None)
        yield from (Stage(downsample=downsample) for downsample in self.downsamplers)


class CrossAttnDownBlock2D(DownBlock2D):
    """The same with a transformer after each residual block."""


class UNetMidBlock2D(nn.Module):
    """The lowest level: a residual block, then transformers with a residual block after each."""

    def __init__(self, level: Level, config: UNetConfig) -> None:
        super().__init__()
        style = resnet_style(config, output_scale_factor=config.mid_block_scale_factor)
        self.attentions = transformers(level, config)
        count = len(self.attentions) + 1
        self.resnets = nn.ModuleList(ResnetBlock2D(level.channels, level.channels, style) for _ in range(count))

    @property
    def stages(self) -> Iterator[Stage]:
        for i, resnet in enumerate(self.resnets):
            yield Stage(resnet, self.attentions[i] if i < len(self.attentions) else None)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x, emb, context)
        return x


class UNetMidBlock2DCrossAttn(UNetMidBlock2D):
    """The same with transformers between its residual blocks."""


class UpBlock2D(nn.Module):
    """A level on the way up: each residual block also sees a skip connection; then twice the resolution."""

    def __init__(self, inputs: int, skips: list[int], level: Level, config: UNetConfig, upsample: bool) -> None:
        super().__init__()
        style = resnet_style(config)
        widths = [inputs, *[level.channels] * (len(skips) - 1)]
        self.resnets = nn.ModuleList(
            ResnetBlock2D(width + skip, level.channels, style) for width, skip in zip(widths, skips, strict=True)
        )
        self.attentions = transformers(level, config)
        self.upsamplers = nn.ModuleList([Upsample2D(level.channels)] if upsample else [])

    @property
    def stages(self) -> Iterator[Stage]:
        last = len(self.resnets) - 1
        for i, resnet in enumerate(self.resnets):
            attention = self.attentions[i] if len(self.attentions) else None
            yield Stage(resnet, attention, upsample=self.upsamplers[0] if i == last and len(self.upsamplers) else None)


class CrossAttnUpBlock2D(UpBlock2D):
    """The same with a transformer after each residual block."""


def transformers(level: Level, config: UNetConfig) -> nn.ModuleList:
    """A transformer for each residual block of the level that has one."""
    return nn.ModuleList(
        Transformer2DModel(
            level.channels,
            level.heads,
            depth,
            level.context,
            groups=config.norm_num_groups,
            linear=config.use_linear_projection,
            only_cross_attention=level.only_cross,
        )
        for depth in level.depths
        if depth is not None
    )


def resnet_style(config: UNetConfig, output_scale_factor: float = 1.0) -> ResnetStyle:
    return ResnetStyle(
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        act=config.act_fn,
        time=config.time_features,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        output_scale_factor=output_scale_factor,
    )


def attends(level: Level) -> bool:
    return any(depth is not None for depth in level.depths)


def down_blocks(config: UNetConfig) -> nn.ModuleList:
    """The way down; every level but the last ends in half its resolution."""
    levels, blocks = config.down_levels, nn.ModuleList()
    inputs = [levels[0].channels, *(level.channels for level in levels)]
    for i, level in enumerate(levels):
        kind = CrossAttnDownBlock2D if attends(level) else DownBlock2D
        blocks.append(kind(inputs[i], level, config, downsample=i < len(levels) - 1))
    return blocks


def mid_block(config: UNetConfig) -> UNetMidBlock2D | None:
    """The middle, which some distilled UNets leave out."""
    for level in config.mid_levels:
        return (UNetMidBlock2DCrossAttn if attends(level) else UNetMidBlock2D)(level, config)
    return None


def up_blocks(config: UNetConfig) -> nn.ModuleList:
    """The way up; every level but the last ends in twice its resolution."""
    skips, blocks = skip_channels(config), nn.ModuleList()
    inputs = config.block_out_channels[-1]
    for i, level in enumerate(config.up_levels):
        taken = [skips.pop() for _ in level.depths]
        kind = CrossAttnUpBlock2D if attends(level) else UpBlock2D
        blocks.append(kind(inputs, taken, level, config, upsample=i < len(config.up_levels) - 1))
        inputs = level.channels
    return blocks


def skip_channels(config: UNetConfig) -> list[int]:
    """Channels of the skip connections: of the first convolution, each residual block and each downsampler."""
    levels = config.down_levels
    channels = [levels[0].channels]
    for i, level in enumerate(levels):
        channels += [level.channels] * (len(level.depths) + (i < len(levels) - 1))
    return channels
