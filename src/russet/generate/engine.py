"""One image from conditioning to pixels. Start reading here.

A picture is made in three phases, each a plain function of what came before:

    halves  = family.encode(prompts, …)            text    → conditioning [B, N, D], and what else the model takes
    for step in denoise(run, predict): …           noise   → latents      [B, C, h, w]
    pixels  = decode(vae, latents, at_once)        latents → pixels       [B, 3, H, W] in [-1, 1]

``Predict`` is the one seam around the model: ``predict(x, t)`` gives the model's output for scaled latents ``x`` at
the time ``t``, and joined to it along the channels the output without the prompt, for the few solvers that need both.
``denoiser.py`` makes it of a UNet and its conditioning; guidance, micro-batches and whatever else changes how the model
is called are wrappers of that function (``guidance.py``). ``run`` is the scheduler's side of the loop: it says where
the model is to be evaluated next and takes its output. The loop belongs to the caller, and so do progress, previews and
cancelling: stop iterating, and it has ended. ``russet.generate.run.Run`` is that caller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from russet.models.autoencoder import Autoencoder
from russet.schedulers.schedule import Passage

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


def denoise(run: Passage, predict: Predict, index: int = 0) -> Iterator[Step]:
    """Calls the model until the run has no place left to evaluate it at, and yields after each call.

    A caller that sets ``run.latents`` between two steps changes what the next one starts from. ``index``: of the first.
    """
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


def encode(
    vae: Autoencoder, pictures: Tensor, generators: tuple[Generator, ...], at_once: int, *, in_float32: bool = True
) -> Tensor:
    """Pictures [B, 3, H, W] in -1..1 → latents [B, C, h, w] as the denoiser takes them, float32.

    pictures: on the device where the VAE computes, which is not where its weights are if they are streamed.
    ``generators`` sample from the distribution that the VAE gives: one for the batch, one per picture, or none. They
    draw in float32, or else in the VAE's precision, as Diffusers does.
    """
    outputs = [vae.encode(part, return_dict=False)[0] for part in torch.split(pictures.to(vae.dtype), at_once)]
    if isinstance(outputs[0], Tensor):  # a tiny autoencoder gives latents
        return scaled(vae, torch.cat(outputs))
    moments = torch.cat([torch.cat([one.mean, one.logvar], dim=1) for one in outputs])
    distribution = type(outputs[0])(moments)
    generator = generators[0] if len(generators) == 1 else generators or None
    return scaled(vae, distribution.sample(generator, dtype=torch.float32 if in_float32 else moments.dtype))


def scaled(vae: Autoencoder, z: Tensor) -> Tensor:
    """Latents as the autoencoder has them → as the denoiser has them, float32: the inverse of ``unscaled``."""
    config = vae.config
    z = z.float()
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (z.new_tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        z = (z - mean) / std
    elif config.shift_factor is not None:
        z = z - config.shift_factor
    latents: Tensor = z * config.scaling_factor
    return latents


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
