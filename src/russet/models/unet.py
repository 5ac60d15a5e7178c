"""The UNet that predicts the noise in a picture from the noisy picture, the time and a text (arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from russet.errors import InputError
from russet.models.activations import ACTIVATIONS
from russet.models.base import Model
from russet.models.blocks import down_blocks, mid_block, up_blocks
from russet.models.embeddings import Embedding, sinusoids
from russet.models.unet_config import UNetConfig


class UNetOutput(NamedTuple):
    """``sample`` [B, Cout, h, w]: noise, velocity or picture, as the scheduler's ``prediction_type`` says."""

    sample: Tensor


class UNet2DConditionModel(Model):
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
        time = config.time_features
        self.act = ACTIVATIONS[config.act_fn]
        self.text_features = config.text_features
        self.conv_in = nn.Conv2d(config.in_channels, first, config.conv_in_kernel, padding=config.conv_in_kernel // 2)
        self.time_embedding = Embedding(first, time, config.act_fn, config.time_cond_proj_dim)
        self.class_embedding = self._class_embedding(config)
        self.add_embedding = None
        if config.projection_class_embeddings_input_dim is not None and config.addition_embed_type == "text_time":
            self.add_embedding = Embedding(config.projection_class_embeddings_input_dim, time)
        self.down_blocks = down_blocks(config)
        self.mid_block = mid_block(config)
        self.up_blocks = up_blocks(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = nn.Conv2d(
            first, config.out_channels, config.conv_out_kernel, padding=config.conv_out_kernel // 2
        )
        self.eval()

    @staticmethod
    def _class_embedding(config: UNetConfig) -> nn.Module | None:
        time = config.time_features
        if config.class_embed_type == "timestep":
            return Embedding(config.block_out_channels[0], time, config.act_fn)
        if config.class_embed_type == "projection" and config.projection_class_embeddings_input_dim is not None:
            return Embedding(config.projection_class_embeddings_input_dim, time)
        return None if config.num_class_embeds is None else nn.Embedding(config.num_class_embeds, time)

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
        """Predicts from noisy latents at one time.

        Args:
            sample: noisy latents [B, Cin, h, w], already scaled by the scheduler.
            timestep: where on the schedule of training they are, 0 to 999: one number, or a tensor of one or of B.
            encoder_hidden_states: the text [B, N, D].
            class_labels: what the class embedding takes: ids [B], numbers [B] or vectors [B, D].
            timestep_cond: the vector [B, D] of a UNet with ``time_cond_proj_dim``, such as LCM's guidance scale.
            added_cond_kwargs: for XL ``text_embeds`` [B, D], the pooled text, and ``time_ids`` [B, 6]: pixels.
            down_block_additional_residuals: ControlNet's maps, one for each map that the way down keeps.
            mid_block_additional_residual: ControlNet's map for the middle; both of these or none.
            return_dict: False gives a plain tuple.

        Raises:
            InputError: shapes that do not fit, or a condition that this UNet lacks, or misses.
        """
        self._check(sample, encoder_hidden_states)
        context = encoder_hidden_states
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        emb = self._time(sample, timestep, timestep_cond)
        emb = self._with_class(emb, class_labels)
        emb = self._with_size(emb, added_cond_kwargs)
        emb = self.act(emb)  # every residual block needs it activated: once here, not once in each of them

        maps = [self.conv_in(sample)]
        for block in self.down_blocks:
            maps += block(maps[-1], emb, context)
        x = maps[-1] if self.mid_block is None else self.mid_block(maps[-1], emb, context)
        maps, x = _controlled(maps, x, down_block_additional_residuals, mid_block_additional_residual)
        for block in self.up_blocks:
            x = block(x, maps, emb, context)
        x = self.conv_out(self.act(self.conv_norm_out(x)))
        return UNetOutput(x) if return_dict else (x,)

    def _check(self, sample: Tensor, context: Tensor) -> None:
        channels, size = self.config.in_channels, tuple(sample.shape)
        if len(size) != 4 or size[1] != channels or min(size) < 1:
            raise InputError(f"sample must have the shape [B, {channels}, h, w], not {list(size)}")
        features = self.text_features
        if context.ndim != 3 or context.shape[0] != size[0] or features not in (None, context.shape[2]):
            wanted = f"[{size[0]}, N, {features or 'any'}]"
            raise InputError(f"encoder_hidden_states must have the shape {wanted}, not {list(context.shape)}")

    def _time(self, sample: Tensor, timestep: float | Tensor, condition: Tensor | None) -> Tensor:
        """The time embedding [B or 1, time]: one row where all pictures are at the same time."""
        if isinstance(timestep, Tensor):
            t = timestep.to(sample.device).reshape(-1)
        else:  # filled on the device, which copies nothing to it
            t = torch.full((1,), float(timestep), dtype=torch.float32, device=sample.device)
        if t.shape[0] not in (1, sample.shape[0]):
            raise InputError(f"timestep must hold 1 or {sample.shape[0]} numbers, as sample has rows; not {t.shape[0]}")
        if condition is not None and self.config.time_cond_proj_dim is None:
            raise InputError("timestep_cond was given, but this UNet has no time_cond_proj_dim to take it")
        waves = self._sinusoids(t, self.config.block_out_channels[0])
        return self.time_embedding(waves.to(sample.dtype), condition)  # type: ignore[no-any-return]

    def _with_class(self, emb: Tensor, labels: Tensor | None) -> Tensor:
        if (labels is None) != (self.class_embedding is None):
            raise InputError(
                "class_labels were given, but this UNet has no class embedding"
                if self.class_embedding is None
                else "this UNet has a class embedding: give class_labels"
            )
        if labels is None or self.class_embedding is None:
            return emb
        if self.config.class_embed_type == "timestep":
            labels = self._sinusoids(labels, self.config.block_out_channels[0])
        if self.config.class_embed_type is not None:
            labels = labels.to(emb.dtype)
        return emb + self.class_embedding(labels)  # type: ignore[no-any-return]

    def _with_size(self, emb: Tensor, added: Mapping[str, Tensor] | None) -> Tensor:
        """Adds XL's embedding of the pooled text and the six numbers of picture size, crop and target size."""
        needed = {"text_embeds", "time_ids"} if self.add_embedding is not None else set()
        given = set(added or {})
        if given != needed:
            raise InputError(
                f"added_cond_kwargs must hold {sorted(needed) or 'nothing'}, not {sorted(given) or 'nothing'}"
            )
        if self.add_embedding is None or added is None or self.config.addition_time_embed_dim is None:
            return emb
        text, ids = added["text_embeds"], added["time_ids"]
        waves = self._sinusoids(ids.flatten(), self.config.addition_time_embed_dim).reshape(ids.shape[0], -1)
        vector = torch.cat([text, waves.to(text.dtype)], dim=-1).to(emb.dtype)
        if vector.shape[-1] != self.config.projection_class_embeddings_input_dim:
            raise InputError(
                f"text_embeds [B, {text.shape[-1]}] and time_ids [B, {ids.shape[-1]}] give {vector.shape[-1]} numbers; "
                f"this UNet takes {self.config.projection_class_embeddings_input_dim}"
            )
        return emb + self.add_embedding(vector)  # type: ignore[no-any-return]

    def _sinusoids(self, numbers: Tensor, dim: int) -> Tensor:
        return sinusoids(numbers, dim, cos_first=self.config.flip_sin_to_cos, shift=self.config.freq_shift)


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
    return [a + b for a, b in zip(maps, down_residuals, strict=True)], mid + mid_residual
