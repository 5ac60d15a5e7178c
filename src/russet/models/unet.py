"""The UNet that predicts the noise in a picture from the noisy picture, the time and a text (arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from russet.backends.ops import convolution, repeated
from russet.errors import InputError
from russet.models.base import Stepping, as_input, require_tensor
from russet.models.blocks import down_blocks, mid_block, up_blocks
from russet.models.conditioning import Conditioned
from russet.models.resnet import Resnet, Time
from russet.models.spare import Spare
from russet.models.text import Text
from russet.models.together import TimeTogether, Together
from russet.models.transformer import MultiHeadAttention, TransformerBlock
from russet.models.unet_config import UNetConfig


class UNetOutput(NamedTuple):
    """``sample`` [B, Cout, h, w]: noise, velocity or picture, as the scheduler's ``prediction_type`` says."""

    sample: Tensor


class DeepOutput(NamedTuple):
    """The same, and ``deep_map`` [B, C, h', w'], from which the rest of the way up began."""

    sample: Tensor
    deep_map: Tensor


class UNet2DConditionModel(Conditioned, Stepping):
    """The denoiser of Stable Diffusion 1, 2 and XL, their inpainting and editing forms, and LCM.

    Args:
        config: the config, as an object or a dict; ``changes`` are single values that win over it.

    Raises:
        ConfigError: the config cannot be built.
    """

    config_class: ClassVar[type[UNetConfig]] = UNetConfig
    config: UNetConfig

    def __init__(self, config: Mapping[str, Any] | None = None, **changes: Any) -> None:
        config = UNetConfig.of(config, changes)
        super().__init__(config)
        first = config.block_out_channels[0]
        self.text_features = config.text_features
        self.conv_in = nn.Conv2d(config.in_channels, first, config.conv_in_kernel, padding=config.conv_in_kernel // 2)
        self.down_blocks = down_blocks(config)
        self.mid_block = mid_block(config)
        self.up_blocks = up_blocks(config)
        self.up_counts = [len(level.depths) for level in config.up_levels]  # residual blocks of each
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, config.norm_eps)
        last = config.out_channels, config.conv_out_kernel
        self.conv_out = nn.Conv2d(first, *last, padding=config.conv_out_kernel // 2)
        blocks = [(b.time_emb_proj, b.conv1) for b in self.modules() if isinstance(b, Resnet) and b.time_emb_proj]
        self.told = TimeTogether([projection for projection, _ in blocks], [conv for _, conv in blocks])
        self.texts = Together([layer for reader in self._readers() for layer in (reader.to_k, reader.to_v)])
        self.eval()

    def read(self, context: Tensor, *, absorbed: bool = False, together: bool = False) -> Text:
        """A text [B, N, D] with the keys and values that every layer makes of it, for many calls of one prompt.

        absorbed: both are multiplied into the weights around them, where that can be: fewer operations in each call.
        together: all are one product, if ``lay_together`` was called: all of it is kept while any part is.
        """
        require_tensor("encoder_hidden_states", context)
        return Text(context.to(self.dtype), self._readers(), absorbed, self.texts if together else None)

    def _readers(self) -> list[MultiHeadAttention]:
        """The layers that attend to the text."""
        blocks = (block for block in self.modules() if isinstance(block, TransformerBlock))
        return [reader for block in blocks for reader in block.readers]

    def tell(self, timesteps: Sequence[float], timestep_cond: Tensor | None = None) -> list[Time]:
        """Times to come, as ``forward`` takes them: computed together, and once for all pictures.

        Raises:
            InputError: this UNet is told more than the time and ``timestep_cond`` [1, D].
        """
        times = torch.tensor(tuple(timesteps), dtype=torch.float32, device=self.device)
        emb = self.embed(times.to(self.dtype), times, timestep_cond, None, None)
        return Time(emb, self.told.shifts(emb)).apart()

    def forward(
        self,
        sample: Tensor,
        timestep: float | Tensor | Time,
        encoder_hidden_states: Tensor | Text,
        *,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        deep_branch: int | None = None,
        deep_map: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetOutput | DeepOutput | tuple[Tensor, ...]:
        """Predicts from noisy latents at one time, in the precision of the weights, whatever that of the inputs is.

        Args:
            sample: noisy latents [B, Cin, h, w], already scaled by the scheduler.
            timestep: where on the schedule of training they are, 0 to 999: one number, or a tensor of one or of B; or
                what ``tell`` made of one, with ``timestep_cond`` in it.
            encoder_hidden_states: the text [B, N, D], or what ``read`` made of it, which saves doing so again. With
                [k·B, N, D] each row of ``sample`` is asked about k texts, the first text of all rows first, and the
                answer has k·B rows: what comes before the first layer that reads is then computed once for all k.
            class_labels: what the class embedding takes: ids [B], numbers [B] or vectors [B, D].
            timestep_cond: the vector [B, D] of a UNet with ``time_cond_proj_dim``, such as LCM's guidance scale.
            added_cond_kwargs: for XL ``text_embeds`` [B, D], the pooled text, and ``time_ids`` [B, 6]: pixels.
            down_block_additional_residuals: ControlNet's maps, one for each map that the way down keeps.
            mid_block_additional_residual: ControlNet's map for the middle; both of these or none.
            deep_branch: returns the map that enters the way up's residual block of this branch as well; 0 is the
                outermost, which joins the first convolution's output (DeepCache, arXiv:2312.00858, section 3.2).
            deep_map: that map from an earlier call. Only what lies outside of it is computed.
            return_dict: False gives a plain tuple.

        Raises:
            InputError: shapes that do not fit, or a condition that this UNet lacks, or misses.
            ArgumentTypeError: something that should be a tensor is none.
        """
        text = encoder_hidden_states if isinstance(encoder_hidden_states, Text) else Text(encoder_hidden_states)
        self._check(sample, text.context)
        sample = as_input(sample, self.dtype)
        if text.context.dtype != sample.dtype:
            text = Text(text.context.to(sample.dtype))
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        if isinstance(timestep, Time):
            if not (timestep_cond is None and class_labels is None and added_cond_kwargs is None):
                raise InputError("a time that was told before has its conditions in it: give no others with it")
            time = timestep
        else:
            emb = self.embed(sample, timestep, timestep_cond, class_labels, added_cond_kwargs)
            if len(emb) > 1:  # rows are told apart from the start, by more than the text
                sample, emb = repeated(sample, text.rows), repeated(emb, text.rows)
            time = Time(emb, self.told.shifts(emb))

        start = 0 if deep_branch is None else self._start(deep_branch)
        if deep_map is None:
            maps = self._way_down(sample, time, text)
            x = maps[-1] if self.mid_block is None else self.mid_block(maps[-1], time, text)
            x = repeated(x, text.rows)  # in case no layer has read yet
            maps, x = _controlled(maps, x, down_block_additional_residuals, mid_block_additional_residual)
            deep_map = self._way_up(x, maps, time, text, end=start)
        elif deep_branch is None or (down_block_additional_residuals, mid_block_additional_residual) != (None, None):
            raise InputError("a deep_map goes with its deep_branch, and with no ControlNet, which reaches deeper")
        else:
            maps = self._way_down(sample, time, text, count=deep_branch + 1)
        x = self._way_up(deep_map, maps, time, text, start)
        x = convolution(self.steps, self.steps.normed(x, self.conv_norm_out, self.act), self.conv_out)
        if deep_branch is None:
            return UNetOutput(x) if return_dict else (x,)
        return DeepOutput(x, deep_map) if return_dict else (x, deep_map)

    @property
    def deep_branches(self) -> int:
        """How many branches ``deep_branch`` can name: one for each map of the way down but the deepest."""
        return sum(self.up_counts) - 1

    def _start(self, branch: int) -> int:
        """The number of the residual block on the way up that a branch joins."""
        if branch not in range(self.deep_branches):
            raise InputError(f"deep_branch must be from 0 to {self.deep_branches - 1} in this UNet, not {branch!r}")
        return self.deep_branches - branch

    def _way_down(self, sample: Tensor, time: Time, text: Text, count: int | None = None) -> list[Tensor]:
        """The maps of the way down, or the first ``count`` of them."""
        maps = [convolution(self.steps, sample, self.conv_in)]
        for block in self.down_blocks:
            left = None if count is None else count - len(maps)
            if left != 0:
                maps += block(maps[-1], time, text, left)
        return maps

    def _way_up(
        self, x: Tensor, maps: list[Tensor], time: Time, text: Text, start: int = 0, end: int | None = None
    ) -> Tensor:
        """Through the residual blocks of the way up from ``start`` to before ``end``, counted over all levels."""
        for block, count in zip(self.up_blocks, self.up_counts, strict=True):
            if start < count and (end is None or end > 0):
                given = Spare(x)
                del x
                x = given.into(block, maps, time, text, start, end)
            start, end = max(0, start - count), None if end is None else max(0, end - count)
        return x

    def _check(self, sample: Tensor, context: Tensor) -> None:
        require_tensor("sample", sample)
        require_tensor("encoder_hidden_states", context)
        channels, size = self.config.in_channels, tuple(sample.shape)
        if len(size) != 4 or size[1] != channels or min(size) < 1:
            raise InputError(f"sample must have the shape [B, {channels}, h, w], not {list(size)}")
        features = self.text_features
        asked = context.ndim == 3 and context.shape[0] >= size[0] and context.shape[0] % size[0] == 0
        if not asked or features not in (None, context.shape[2]):
            wanted = f"[{size[0]}, N, {features or 'any'}]"
            raise InputError(f"encoder_hidden_states must have the shape {wanted}, not {list(context.shape)}")


def _controlled(
    maps: list[Tensor], mid: Tensor, down_residuals: Sequence[Tensor] | None, mid_residual: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """The kept maps and the middle with ControlNet's residuals added (arXiv:2302.05543)."""
    if down_residuals is None and mid_residual is None:
        return maps, mid
    if down_residuals is None or mid_residual is None or len(down_residuals) != len(maps):
        came = 0 if down_residuals is None else len(down_residuals)
        raise InputError(
            f"a ControlNet gives {len(maps)} down_block_additional_residuals and a mid_block_additional_residual; "
            f"{came} and {'none' if mid_residual is None else 'one'} came"
        )
    added = [repeated(a, len(b)) + b.to(a.dtype) for a, b in zip(maps, down_residuals, strict=True)]
    return added, mid + mid_residual.to(mid.dtype)
