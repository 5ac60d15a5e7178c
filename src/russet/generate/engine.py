"""One image from conditioning to pixels. Start reading here.

A picture is made in three phases, each a plain function of what came before:

    context = prompt.encode(…)                     text    → conditioning [B, N, D]
    for step in denoise(run, predict): …           noise   → latents      [B, C, h, w]
    pixels  = decode(vae, latents)                 latents → pixels       [B, 3, H, W] in [-1, 1]

``Predict`` is the one seam around the model: ``predict(x, t)`` gives the model's output for scaled latents ``x`` at
the time ``t``, and joined to it along the channels the output without the prompt, for the few solvers that need both.
Guidance, micro-batches and whatever else changes how the model is called are wrappers of that function
(``guidance.py``). ``run`` is the scheduler's side of the loop: it says where the model is to be evaluated next and
takes its answer. The loop belongs to the caller, and so do progress, previews and cancelling: stop iterating, and it
has ended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from russet.models.autoencoder import Autoencoder
from russet.schedulers.schedule import Run

Predict = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Step:
    """One model call that is done. x0: the picture's latents [B, C, h, w] as that call predicted them."""

    index: int
    t: float
    x0: Tensor
    latents_later: Callable[[], Tensor]

    @functools.cached_property
    def latents(self) -> Tensor:
        """[B, C, h, w], in the scheduler's public convention."""
        return self.latents_later()


def denoise(run: Run, predict: Predict) -> Iterator[Step]:
    """Calls the model until the run has no place left to evaluate it at, and yields after each call.

    A caller that sets ``run.latents`` between two steps changes what the next one starts from.
    """
    index = 0
    while (t := run.t) is not None:
        run.send(*predict(run.model_input, t).chunk(1 + run.schedule.needs_unconditional, dim=1))
        assert run.x0 is not None
        yield Step(index, t, run.x0, run.latents_later)
        index += 1


def decode(vae: Autoencoder, latents: Tensor, at_once: int) -> Tensor:
    """Latents [B, C, h, w] as the denoiser leaves them → pixels [B, 3, H, W] in [-1, 1], float32.

    ``at_once`` pictures are decoded in one call.
    """
    parts = torch.split(unscaled(vae, latents).to(vae.dtype), at_once)
    return torch.cat([vae.decode(part, return_dict=False)[0].float() for part in parts])


def unscaled(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Latents as the denoiser has them → as the autoencoder has them, float32.

    Undoes the scaling of arXiv:2112.10752, appendix G, and the shift and the statistics per channel of later
    autoencoders.
    """
    config = vae.config
    z: Tensor = latents.float() / config.scaling_factor
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (z.new_tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        z = z * std + mean
    elif config.shift_factor is not None:
        z = z + config.shift_factor
    return z
