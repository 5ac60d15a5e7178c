"""The memory that a UNet call takes: a walk along its stages."""

from __future__ import annotations

from russet.models.footprint import Arithmetic, Walk
from russet.models.unet_config import StageConfig, UNetConfig


def unet_peak(u: UNetConfig, rows: int, latents: tuple[int, int], how: Arithmetic) -> int:
    """Peak of one UNet call on ``rows`` rows of latents ``(h, w)``."""
    sides = [(-(-latents[0] // (1 << n)), -(-latents[1] // (1 << n))) for n in range(len(u.block_out_channels))]
    areas = [height * width for height, width in sides]
    walk = Walk(rows, how, dict(zip(areas, sides, strict=True)), timed=True)
    skips = [walk.map(areas[0], u.block_out_channels[0])]
    times = u.time_features + sum(stage.channels for stage in u.stages)  # of one row, or all rows have one time
    walk.held = walk.map(areas[0], u.in_channels) + skips[0] + times * how.width
    for stage in u.input_stages:  # the outputs of all of them are held
        if stage.resampling == "down":
            out = walk.map(areas[stage.level + 1], stage.channels)
        else:
            out = walk.map(areas[stage.level], stage.channels)
            walk.resnet(areas[stage.level], skips[-1], out, held=True)
            attention(walk, stage, areas)
        walk.held += out
        skips.append(out)
    x = skips[-1]
    for place, stage in enumerate(u.mid_stages):
        walk.resnet(areas[stage.level], x, x, held=place == 0)
        walk.held += 0 if place else x  # what comes of it is held until the end
        attention(walk, stage, areas)
    way_up(walk, u, areas, skips, x)
    return walk.peak


def way_up(walk: Walk, u: UNetConfig, areas: list[int], skips: list[int], x: int) -> None:
    """Each residual block sees one more of the skip connections, joined to ``x``."""
    middle, sums = len(u.mid_stages) > 0, walk.how.channel_sums
    for place, stage in enumerate(u.output_stages):
        area, skip = areas[stage.level], skips.pop()
        joined, out = x + skip, walk.map(area, stage.channels)
        workspace = 0 if sums is None else sums(walk.rows, joined // walk.map(area, 1), area)
        walk.moment(0 if place == 0 else x, joined, workspace)  # the first is held already
        walk.held -= skip if middle or place else 0  # without a middle it is what the way up begins with
        kept = 0 if walk.how.donates else joined  # until the stage has returned
        walk.held += kept
        walk.resnet(area, joined, out, held=kept > 0, donated=True)
        attention(walk, stage, areas)
        x = out
        if stage.resampling == "up":
            walk.upsample(x, stage.channels, areas[stage.level - 1])
            x = walk.map(areas[stage.level - 1], stage.channels)
        walk.held -= kept
    walk.norm(x, x)
    if not walk.how.donates:
        walk.moment(x, 2 * x)


def attention(walk: Walk, stage: StageConfig, areas: list[int]) -> None:
    """The transformer behind a stage's residual block, where there is one."""
    if stage.depth is not None:
        walk.transformer(areas[stage.level], stage.channels, stage.heads, stage.depth)


def deep_map(u: UNetConfig, branch: int) -> tuple[int, int]:
    """Level and channels of the map that enters the output stage of a branch (DeepCache); 0 is the outermost."""
    stages = u.output_stages
    return stages[-1 - branch].level, stages[-2 - branch].channels
