"""What a denoiser is told besides its picture and the text: the time, a class, XL's sizes, LCM's guidance scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from russet.errors import ArgumentTypeError, InputError
from russet.models.activations import ACTIVATIONS
from russet.models.base import Model
from russet.models.embeddings import TimestepEmbedding, sinusoids
from russet.models.unet_config import UNetConfig


class Conditioned(Model):
    """A network whose residual blocks are steered by one vector, the time embedding, that gathers all of this."""

    config: UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        width, time = config.block_out_channels[0], config.time_features
        self.act = ACTIVATIONS[config.act_fn]
        self.time_embedding = TimestepEmbedding(width, time, config.act_fn, config.time_cond_proj_dim)
        self.class_embedding: nn.Module | None = None
        self.add_embedding: TimestepEmbedding | None = None
        projected = config.projection_class_embeddings_input_dim
        if config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(width, time, config.act_fn)
        elif config.class_embed_type == "projection" and projected is not None:
            self.class_embedding = TimestepEmbedding(projected, time)
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time)
        if config.addition_embed_type == "text_time" and projected is not None:
            self.add_embedding = TimestepEmbedding(projected, time)

    def embed(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        timestep_cond: Tensor | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The time embedding, activated: [B, time], or [1, time] where it is the same for all rows of ``sample``.

        Raises:
            InputError: a condition that this network lacks, or misses, or whose shape does not fit.
        """
        emb = self._time(sample, timestep, timestep_cond)
        emb = self._with_class(emb, class_labels)
        emb = self._with_size(emb, added_cond_kwargs)
        return self.act(emb)  # every residual block needs it activated: once here, not once in each of them

    def _time(self, sample: Tensor, timestep: float | Tensor, condition: Tensor | None) -> Tensor:
        if condition is not None and self.config.time_cond_proj_dim is None:
            raise InputError("timestep_cond was given, but this network has no time_cond_proj_dim to take it")
        t = times(timestep, sample)
        waves = self._sinusoids(t, self.config.block_out_channels[0]).to(sample.dtype)
        return self.time_embedding(waves, None if condition is None else condition.to(waves.dtype))  # type: ignore[no-any-return]

    def _with_class(self, emb: Tensor, labels: Tensor | None) -> Tensor:
        if self.class_embedding is None:
            if labels is not None:
                raise InputError("class_labels were given, but this network has no class embedding")
            return emb
        if labels is None:
            raise InputError("this network has a class embedding: give class_labels")
        if self.config.class_embed_type == "timestep":
            labels = self._sinusoids(labels, self.config.block_out_channels[0])
        if self.config.class_embed_type is not None:
            labels = labels.to(emb.dtype)
        return emb + self.class_embedding(labels)  # type: ignore[no-any-return]

    def _with_size(self, emb: Tensor, added: Mapping[str, Tensor] | None) -> Tensor:
        """Adds XL's embedding of the pooled text and the numbers for picture size, crop and target size."""
        needed = [] if self.add_embedding is None else ["text_embeds", "time_ids"]
        given = sorted(added or ())
        if given != needed:
            raise InputError(f"added_cond_kwargs must hold {needed or 'nothing'}, not {given or 'nothing'}")
        dim = self.config.addition_time_embed_dim
        if self.add_embedding is None or added is None or dim is None:
            return emb
        text, ids = added["text_embeds"], added["time_ids"]
        waves = self._sinusoids(ids.flatten(), dim).reshape(ids.shape[0], -1)
        vector = torch.cat([text.to(emb.dtype), waves.to(emb.dtype)], dim=-1)
        if vector.shape[-1] != self.config.projection_class_embeddings_input_dim:
            raise InputError(
                f"text_embeds [B, {text.shape[-1]}] and time_ids [B, {ids.shape[-1]}] give {vector.shape[-1]} numbers; "
                f"this network takes {self.config.projection_class_embeddings_input_dim}"
            )
        return emb + self.add_embedding(vector)  # type: ignore[no-any-return]

    def _sinusoids(self, numbers: Tensor, dim: int) -> Tensor:
        return sinusoids(numbers, dim, cos_first=self.config.flip_sin_to_cos, shift=self.config.freq_shift)


def times(timestep: float | Tensor, sample: Tensor) -> Tensor:
    """The time as a tensor [1], or [B] with one for each row of ``sample``, on its device.

    Raises:
        ArgumentTypeError: neither a number nor a tensor.
        InputError: not finite, or another count of numbers than of rows.
    """
    if isinstance(timestep, Tensor):
        if timestep.numel() not in (1, len(sample)):
            raise InputError(f"timestep must hold 1 or {len(sample)} numbers, as sample has rows: {timestep.numel()}")
        return timestep.to(sample.device).reshape(-1)
    if not isinstance(timestep, Real):
        raise ArgumentTypeError(f"timestep must be a number or a tensor, not {type(timestep).__name__}")
    if not math.isfinite(timestep):
        raise InputError(f"timestep must be finite, not {timestep}")
    # Filled on the device: nothing is copied to it.
    return torch.full((1,), float(timestep), dtype=torch.float32, device=sample.device)
