"""The UNet that predicts the noise in a picture from the noisy picture, the time and a text (arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from russet.errors import InputError
from russet.models.base import as_input, require_tensor
from russet.models.conditioning import Conditioned
from russet.models.unet_blocks import DownBlock2D, Stage, UpBlock2D, down_blocks, mid_block, up_blocks
from russet.models.unet_config import UNetConfig


class UNetOutput(NamedTuple):
    """``sample`` [B, Cout, h, w]: noise, velocity or picture, as the scheduler's ``prediction_type`` says."""

    sample: Tensor


class UNet2DConditionModel(Conditioned):
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
        first, kernel_in, kernel_out = config.block_out_channels[0], config.conv_in_kernel, config.conv_out_kernel
        self.conv_in = nn.Conv2d(config.in_channels, first, kernel_in, padding=kernel_in // 2)
        self.down_blocks = down_blocks(config)
        self.mid_block = mid_block(config)
        self.up_blocks = up_blocks(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, kernel_out, padding=kernel_out // 2)
        self.eval()

    @property
    def input_stages(self) -> list[Stage]:
        """The way down as one list; the output of each stage is a skip connection."""
        return [stage for block in self.down_blocks for stage in cast(DownBlock2D, block).stages]

    @property
    def output_stages(self) -> list[Stage]:
        """The way up as one list; each stage takes one skip connection, the latest first."""
        return [stage for block in self.up_blocks for stage in cast(UpBlock2D, block).stages]

    def forward(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        encoder_hidden_states: Tensor,
        *,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Tensor]:
        """Predicts from noisy latents at one time, in the precision of the weights, whatever that of the inputs is.

        Args:
            sample: noisy latents [B, Cin, h, w], already scaled by the scheduler.
            timestep: where on the schedule of training they are, 0 to 999: one number, or a tensor of one or of B.
            encoder_hidden_states: the text [B, N, D].
            class_labels: what the class embedding takes: ids [B], numbers [B] or vectors [B, D].
            timestep_cond: the vector [B, D] of a UNet with ``time_cond_proj_dim``, such as LCM's guidance scale.
            added_cond_kwargs: for XL ``text_embeds`` [B, D], the pooled text, and ``time_ids`` [B, 6]: pixels.
            down_block_additional_residuals: a ControlNet's residuals, one for each skip connection.
            mid_block_additional_residual: a ControlNet's residual for the middle; both of these or none.
            return_dict: False gives a plain tuple.

        Raises:
            InputError: shapes that do not fit, or a condition that this UNet lacks, or misses.
            ArgumentTypeError: something that should be a tensor is none.
        """
        sample, context = self.inputs(sample, encoder_hidden_states)
        emb = self.embed(sample, timestep, timestep_cond, class_labels, added_cond_kwargs)
        skips = self.down(sample, emb, context)
        x = self.middle(skips[-1], emb, context)
        if down_block_additional_residuals is not None or mid_block_additional_residual is not None:
            skips, x = self.add_residuals(skips, x, down_block_additional_residuals, mid_block_additional_residual)
        x = self.head(self.up(x, skips, emb, context))
        return UNetOutput(x) if return_dict else (x,)

    def inputs(self, sample: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and text, checked, in the network's precision."""
        require_tensor("sample", sample)
        require_tensor("encoder_hidden_states", context)
        channels, size = self.config.in_channels, tuple(sample.shape)
        if len(size) != 4 or size[1] != channels or min(size) < 1:
            raise InputError(f"sample must have the shape [B, {channels}, h, w], not {list(size)}")
        self.check_text(context, size[0])
        return as_input(sample, self.dtype), context.to(self.dtype)

    def check_text(self, context: Tensor, rows: int) -> None:
        """Raises InputError for a text that is not [rows, N, D]."""
        features = self.config.text_features
        if context.ndim != 3 or len(context) != rows or features not in (None, context.shape[2]):
            wanted = f"[{rows}, N, {features or 'any'}]"
            raise InputError(f"encoder_hidden_states must have the shape {wanted}, not {list(context.shape)}")

    def down(self, sample: Tensor, emb: Tensor, context: Tensor, count: int | None = None) -> list[Tensor]:
        """The skip connections, or the first ``count`` of them: of the first convolution, then of every stage."""
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        skips = [self.conv_in(sample)]
        for stage in self.input_stages[: None if count is None else count - 1]:
            skips.append(stage(skips[-1], emb, context))
        return skips

    def middle(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """The lowest level, which some UNets lack."""
        return x if self.mid_block is None else self.mid_block(x, emb, context)

    def up(
        self, x: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Through the output stages from ``start`` to before ``stop``; takes their skip connections from ``skips``."""
        for stage in self.output_stages[start:stop]:
            x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, emb, context, size=(skips[-1].shape[2], skips[-1].shape[3]) if skips else None)
        return x

    def add_residuals(
        self, skips: list[Tensor], x: Tensor, down: Sequence[Tensor] | None, mid: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """The skip connections and the middle with a ControlNet's residuals added (arXiv:2302.05543, section 3.2)."""
        if down is None or mid is None or len(down) != len(skips):
            raise InputError(
                f"a ControlNet gives {len(skips)} down_block_additional_residuals and a mid_block_additional_residual; "
                f"{len(down or ())} and {'none' if mid is None else 'one'} came"
            )
        added = [skip + residual.to(skip.dtype) for skip, residual in zip(skips, down, strict=True)]
        return added, x + mid.to(x.dtype)

    def head(self, x: Tensor) -> Tensor:
        """What the last map predicts."""
        return self.conv_out(self.act(self.conv_norm_out(x)))  # type: ignore[no-any-return]
