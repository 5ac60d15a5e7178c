"""The UNet's way through its stages: on donated buffers, with what guidance's halves share computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from russet.backends.blocks.inputs import Context, TimeShifts, plain_time
from russet.backends.blocks.resnet import OptimizedResnet
from russet.backends.blocks.transformer import OptimizedTransformer2D
from russet.backends.donation import Donated, taken
from russet.backends.ops import EAGER, Ops, repeated_rows, whole_conv
from russet.errors import InputError
from russet.models.unet import UNet2DConditionModel
from russet.models.unet_blocks import Stage


class PackedTime(Protocol):
    """The time's projections in all residual blocks as one product."""

    def shifts(self, emb: Tensor) -> Mapping[nn.Module, Tensor]:
        """Projection → its output for ``emb`` [B or 1, D], with the bias of its block's first convolution."""
        ...


class OptimizedUNet(UNet2DConditionModel):
    """``UNet2DConditionModel``, which also takes texts for k·B rows of B rows of latents, and answers k·B rows."""

    ops: Ops = EAGER
    packed_time: PackedTime | None = None

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
        if emb.rows > 1:  # rows are told apart from the start, by more than the text
            sample = repeated_rows(sample, context.rows)
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        skips = [whole_conv(self.ops, sample, self.conv_in)]
        for stage in self.input_stages[: None if count is None else count - 1]:
            skips.append(self._stage(stage, skips[-1], emb, context))
        return skips

    def middle(self, x: Tensor, emb: TimeShifts, context: Tensor | Context) -> Tensor:  # type: ignore[override]
        context = Context.of(context)
        if self.mid_block is not None:
            for stage in self.mid_block.stages:
                x = self._stage(stage, x, emb, context)
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
        for stage in self.output_stages[start:stop]:
            joined = Donated(self.ops.cat(x, skips.pop()))
            del x  # before the stage's widest moment
            size = (skips[-1].shape[2], skips[-1].shape[3]) if skips else None
            x = self._stage(stage, joined, emb, context, size)
        return x

    def head(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().head(x)
        return whole_conv(self.ops, self.ops.group_norm(x, self.conv_norm_out, self.act), self.conv_out)

    def _stage(
        self,
        stage: Stage,
        given: Tensor | Donated,
        emb: TimeShifts,
        context: Context,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """One stage; a block that is not ours to steer gets plain tensors."""
        fresh = isinstance(stage.resnet, OptimizedResnet)  # whose output nobody else has seen
        if isinstance(stage.resnet, OptimizedResnet):
            x: Tensor = stage.resnet(given, emb)
        else:
            x = taken(given)
            x = x if stage.resnet is None else stage.resnet(x, plain_time(emb))
        if isinstance(stage.attention, OptimizedTransformer2D):
            x = stage.attention(x, context, donated=fresh)
        elif stage.attention is not None:
            x = stage.attention(repeated_rows(x, context.rows), context.tensor)
        x = x if stage.downsample is None else stage.downsample(x)
        return x if stage.upsample is None else stage.upsample(x, size)

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
        text, rows = Context.of(context).tensor, len(sample) if isinstance(sample, Tensor) and sample.ndim else 0
        shared = isinstance(text, Tensor) and text.ndim == 3 and rows and len(text) % rows == 0 and len(text) >= rows
        sample, first = super().inputs(sample, text[:rows] if shared else text)
        return sample, context if first.dtype == text.dtype else Context(text.to(first.dtype))
