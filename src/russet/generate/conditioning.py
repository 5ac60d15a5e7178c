"""What the denoiser is conditioned on besides the noisy latents and the timestep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class Conditioning:
    """Tensors by the names of the UNet's arguments, each with one row per image: [B, …].

    ``encoder_hidden_states`` [B, N, D] is always there; ``text_embeds`` [B, P], ``time_ids`` [B, 6] and
    ``timestep_cond`` [B, W] where the model takes them.

    positive: of the prompts.
    negative: the same names for the negative prompts; None means that there is no guidance.
    """

    positive: Rows
    negative: Rows | None = None

    def __len__(self) -> int:
        """B: how many images."""
        return len(next(iter(self.positive.values())))

    @property
    def joined(self) -> Rows:
        """Both halves as [2B, …], the negative one first, or [B, …] without guidance."""
        if self.negative is None:
            return self.positive
        return {name: torch.cat([self.negative[name], tensor]) for name, tensor in self.positive.items()}

    @property
    def without_negative(self) -> Conditioning:
        return Conditioning(self.positive)

    def rows(self, start: int, stop: int) -> Conditioning:
        """The part that belongs to some of the images."""
        return self._each(lambda tensor: tensor[start:stop])

    def repeated(self, times: int) -> Conditioning:
        """Each row ``times`` times in a row: several images per prompt."""
        if times == 1:
            return self
        # mps has no repeat_interleave before torch 2.0
        return self._each(lambda x: x[:, None].expand(-1, times, *x.shape[1:]).flatten(0, 1))

    def to(self, device: torch.device) -> Conditioning:
        return self._each(lambda tensor: tensor.to(device))

    def extended(self, **more: Tensor) -> Conditioning:
        """With further tensors [B, …], which are the same in both halves."""
        negative = None if self.negative is None else {**self.negative, **more}
        return Conditioning({**self.positive, **more}, negative)

    def with_halves(self, name: str, positive: Tensor, negative: Tensor | None) -> Conditioning:
        """With one tensor replaced. Without a negative form of it there is no negative half, so no guidance."""
        if negative is None:
            return Conditioning({**self.positive, name: positive})
        other = self.positive if self.negative is None else self.negative
        return replace(self, positive={**self.positive, name: positive}, negative={**other, name: negative})

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        def half(rows: Rows) -> Rows:
            return {name: change(tensor) for name, tensor in rows.items()}

        return Conditioning(half(self.positive), None if self.negative is None else half(self.negative))
