"""The UNet's way through its stages: on donated buffers, with what guidance's halves share computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from russet.backends.blocks.inputs import Context, TimeShifts, plain_time
from russet.backends.blocks.resnet import OptimizedDownsample, OptimizedResnet
from russet.backends.blocks.transformer import OptimizedTransformer2D
from russet.backends.donation import Donated, taken
from russet.backends.ops import EAGER, Ops, repeated_rows, whole_conv
from russet.errors import InputError
from russet.models.unet import UNet2DConditionModel
from russet.models.unet_blocks import Stage, UNetMidBlock2D, UNetMidBlock2DCrossAttn


class PackedTime(Protocol):
    """The time's projections in all residual blocks as one product."""

    def shifts(self, emb: Tensor) -> Mapping[nn.Module, Tensor]:
        """Projection → its output for ``emb`` [B or 1, D], with the bias of its block's first convolution."""
        ...


class OptimizedMidBlock(UNetMidBlock2D):
    """``UNetMidBlock2D``, which also takes the text and the time with what was computed of them beforehand."""

    def forward(self, x: Tensor, emb: Tensor | TimeShifts, context: Tensor | Context) -> Tensor:
        context = Context.of(context)
        for part in self.stages:
            x = stage(part, x, emb, context)
        return x


class OptimizedCrossAttnMidBlock(OptimizedMidBlock, UNetMidBlock2DCrossAttn):
    """``UNetMidBlock2DCrossAttn``."""


class OptimizedUNet(UNet2DConditionModel):
    """``UNet2DConditionModel``, which also takes texts for k·B rows of B rows of latents, and answers k·B rows.

    shares_prefix: what comes before the first text is computed for B rows. precomputes_times: nobody watches the layers
    of the time, so that they may be called once for many times.
    """

    ops: Ops = EAGER
    packed_time: PackedTime | None = None
    shares_prefix: bool = False
    precomputes_times: bool = False

    def embed(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: float | Tensor | TimeShifts,
        timestep_cond: Tensor | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Tensor | TimeShifts:
        if isinstance(timestep, TimeShifts):
            if not (timestep_cond is None and class_labels is None and added_cond_kwargs is None):
                raise InputError("a precomputed time has its conditions in it: give no others with it")
            return timestep
        emb = super().embed(sample, timestep, timestep_cond, class_labels, added_cond_kwargs)
        if torch.is_grad_enabled():
            return emb
        return TimeShifts(emb, None if self.packed_time is None else self.packed_time.shifts(emb))

    def precompute_times(self, timesteps: Sequence[float], timestep_cond: Tensor | None = None) -> list[TimeShifts]:
        """The embeddings of times to come as ``forward`` takes them; ``timestep_cond`` is [1, D].

        Raises:
            InputError: this UNet has conditions besides the time and ``timestep_cond``.
        """
        times = torch.tensor(tuple(timesteps), dtype=torch.float32, device=self.device)
        shifts = self.embed(times.to(self.dtype), times, timestep_cond)
        assert isinstance(shifts, TimeShifts), "gradients are disabled"
        return shifts.split()

    def down(  # type: ignore[override]
        self, sample: Tensor, emb: TimeShifts, context: Tensor | Context, count: int | None = None
    ) -> list[Tensor]:
        context = Context.of(context)
        if torch.is_grad_enabled():
            return super().down(repeated_rows(sample, context.rows), plain_time(emb), context.tensor, count)
        if emb.rows > 1 or not self.shares_prefix:  # rows may differ from the start, by more than the text
            sample = repeated_rows(sample, context.rows)
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        skips = [whole_conv(self.ops, sample, self.conv_in)]
        for part in self.input_stages[: None if count is None else count - 1]:
            skips.append(stage(part, skips[-1], emb, context))
        return skips

    def middle(self, x: Tensor, emb: TimeShifts, context: Tensor | Context) -> Tensor:  # type: ignore[override]
        context = Context.of(context)
        if isinstance(self.mid_block, OptimizedMidBlock):
            x = self.mid_block(x, emb, context)
        elif self.mid_block is not None:
            x = self.mid_block(repeated_rows(x, context.rows), plain_time(emb), context.tensor)
        return repeated_rows(x, context.rows)  # in case no layer has attended to the text yet

    def up(  # type: ignore[override]
        self,
        x: Tensor,
        skips: list[Tensor],
        emb: TimeShifts,
        context: Tensor | Context,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        context = Context.of(context)
        if torch.is_grad_enabled():
            return super().up(x, skips, plain_time(emb), context.tensor, start, stop)
        for part in self.output_stages[start:stop]:
            joined = Donated(self.ops.cat(x, skips.pop()))
            del x  # before the stage's widest moment
            size = (skips[-1].shape[2], skips[-1].shape[3]) if skips else None
            x = stage(part, joined, emb, context, size)
        return x

    def head(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().head(x)
        return whole_conv(self.ops, self.ops.group_norm(x, self.conv_norm_out, self.act), self.conv_out)

    def add_residuals(
        self, skips: list[Tensor], x: Tensor, down: Sequence[Tensor] | None, mid: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        if down is not None:
            rows = [len(residual) for residual in down]
            skips = [repeated_rows(skip, row) for skip, row in zip(skips, rows, strict=False)] + skips[len(rows) :]
        return super().add_residuals(skips, x, down, mid)

    def inputs(  # type: ignore[override]
        self, sample: Tensor, context: Tensor | Context
    ) -> tuple[Tensor, Tensor | Context]:
        text = Context.of(context).tensor
        sample, cast = super().inputs(sample, text)
        return sample, context if cast.dtype == text.dtype else Context(cast)

    def check_text(self, context: Tensor, rows: int) -> None:
        several = context.ndim == 3 and len(context) > 0 and len(context) % rows == 0  # texts for each row of latents
        super().check_text(context, len(context) if several else rows)


def stage(
    part: Stage,
    given: Tensor | Donated,
    emb: Tensor | TimeShifts,
    context: Context,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """One stage; a block that is not ours to steer gets plain tensors with all rows."""
    fresh = isinstance(part.resnet, OptimizedResnet)  # whose output nobody else has seen
    if isinstance(part.resnet, OptimizedResnet):
        x: Tensor = part.resnet(given, emb)
    else:
        x = taken(given)
        x = x if part.resnet is None else part.resnet(repeated_rows(x, context.rows), plain_time(emb))
    if isinstance(part.attention, OptimizedTransformer2D):
        x = part.attention(x, context, donated=fresh)
    elif part.attention is not None:
        x = part.attention(repeated_rows(x, context.rows), context.tensor)
    if part.downsample is not None:
        own = isinstance(part.downsample, OptimizedDownsample)
        x = part.downsample(x if own else repeated_rows(x, context.rows))
    return x if part.upsample is None else part.upsample(x, size)
