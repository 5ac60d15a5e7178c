"""The UNet's levels: residual blocks with a transformer after each, then a change of resolution."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from russet.backends.ops import hooked
from russet.models.base import Stepping
from russet.models.resnet import Downsample, Resnet, ResnetStyle, Time, Upsample
from russet.models.spare import Spare, taken
from russet.models.text import Text
from russet.models.transformer import SpatialTransformer
from russet.models.unet_config import Level, UNetConfig


class DownBlock(nn.Module):
    """A level on the way down. Everything that it computes is kept for the way up."""

    def __init__(self, inputs: int, level: Level, config: UNetConfig, downsample: bool) -> None:
        super().__init__()
        widths = [inputs, *[level.channels] * len(level.depths)]
        style = resnet_style(config)
        self.resnets = nn.ModuleList(Resnet(a, b, style) for a, b in pairwise(widths))
        self.attentions = attentions(level, config)
        self.downsamplers = nn.ModuleList([Downsample(level.channels, config.downsample_padding)] if downsample else [])

    def forward(self, x: Tensor, time: Time, text: Text, count: int | None = None) -> list[Tensor]:
        """From a map [B, C, h, w], the time and the text to all maps made from it, in order, or the first ``count``."""
        maps: list[Tensor] = []
        for i, resnet in enumerate(self.resnets):
            if len(maps) == count:
                return maps
            x = resnet(x, time)
            if len(self.attentions) > 0:
                x = attended(x, resnet, self.attentions[i], text)
            maps.append(x)
        if len(maps) != count:
            maps.extend(downsample(x) for downsample in self.downsamplers)
        return maps


class MidBlock(nn.Module):
    """The lowest level: a residual block, then transformers with a residual block after each."""

    def __init__(self, level: Level, config: UNetConfig) -> None:
        super().__init__()
        style = resnet_style(config, divisor=config.mid_block_scale_factor)
        self.attentions = attentions(level, config)
        count = len(self.attentions) + 1
        self.resnets = nn.ModuleList(Resnet(level.channels, level.channels, style) for _ in range(count))

    def forward(self, x: Tensor, time: Time, text: Text) -> Tensor:
        x = self.resnets[0](x, time)
        for before, attention, resnet in zip(self.resnets[:-1], self.attentions, self.resnets[1:], strict=True):
            x = resnet(attended(x, before, attention, text), time)
        return x


class UpBlock(Stepping):
    """A level on the way up. Each residual block also sees a map of the way down, the latest first."""

    def __init__(self, inputs: int, skips: list[int], level: Level, config: UNetConfig, upsample: bool) -> None:
        super().__init__()
        style = resnet_style(config)
        widths = [inputs, *[level.channels] * len(skips)]
        self.resnets = nn.ModuleList(
            Resnet(width + skip, level.channels, style) for width, skip in zip(widths, skips, strict=False)
        )
        self.attentions = attentions(level, config)
        self.upsamplers = nn.ModuleList([Upsample(level.channels)] if upsample else [])

    def forward(
        self, given: Tensor | Spare, skips: list[Tensor], time: Time, text: Text, start: int = 0, end: int | None = None
    ) -> Tensor:
        """Takes its maps from the end of ``skips``; what is left there gives the size to upsample to.

        ``start`` and ``end`` are those of a slice of its residual blocks; one that ends early does not upsample.
        """
        x = taken(given)
        for i, resnet in list(enumerate(self.resnets))[start:end]:
            joined = Spare(self.steps.joined(x, skips.pop()))
            del x  # before the level's widest moment
            x = joined.into(resnet, time)
            if len(self.attentions) > 0:
                x = attended(x, resnet, self.attentions[i], text)
        if end is not None and end < len(self.resnets):
            return x
        for upsample in self.upsamplers:
            x = upsample(x, (skips[-1].shape[2], skips[-1].shape[3]))
        return x


def attended(x: Tensor, made_by: nn.Module, attention: nn.Module, text: Text) -> Tensor:
    """What attention makes of a map, in its place unless somebody watches who made it or who takes it."""
    return attention(x, text, spare=not (hooked(made_by) or hooked(attention)))  # type: ignore[no-any-return]


def attentions(level: Level, config: UNetConfig) -> nn.ModuleList:
    """A transformer for each residual block of the level that has one."""
    return nn.ModuleList(
        SpatialTransformer(
            level.channels,
            level.heads,
            depth,
            level.context,
            groups=config.norm_num_groups,
            linear=config.use_linear_projection,
            only_cross=level.only_cross,
        )
        for depth in level.depths
        if depth is not None
    )


def resnet_style(config: UNetConfig, divisor: float = 1.0) -> ResnetStyle:
    return ResnetStyle(
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        act=config.act_fn,
        time=config.time_features,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        divisor=divisor,
    )


def down_blocks(config: UNetConfig) -> nn.ModuleList:
    """The way down; every level but the last ends in half its resolution."""
    levels = config.down_levels
    inputs = [levels[0].channels, *(level.channels for level in levels)]
    return nn.ModuleList(
        DownBlock(inputs[i], level, config, downsample=i < len(levels) - 1) for i, level in enumerate(levels)
    )


def mid_block(config: UNetConfig) -> MidBlock | None:
    """The middle, which some distilled UNets leave out."""
    return next((MidBlock(level, config) for level in config.mid_levels), None)


def up_blocks(config: UNetConfig) -> nn.ModuleList:
    """The way up; every level but the last ends in twice its resolution."""
    skips = skip_channels(config)
    blocks = nn.ModuleList()
    inputs = config.block_out_channels[-1]
    for i, level in enumerate(config.up_levels):
        taken = [skips.pop() for _ in level.depths]
        blocks.append(UpBlock(inputs, taken, level, config, upsample=i < len(config.up_levels) - 1))
        inputs = level.channels
    return blocks


def skip_channels(config: UNetConfig) -> list[int]:
    """Channels of the maps kept on the way down: of the first convolution, each residual block, each downsampler."""
    levels = config.down_levels
    channels = [levels[0].channels]
    for i, level in enumerate(levels):
        channels += [level.channels] * (len(level.depths) + (i < len(levels) - 1))
    return channels
