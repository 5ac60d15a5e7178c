"""The autoencoder between pictures and the latents that the UNet works on (arXiv:2112.10752, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from russet.errors import InputError
from russet.models.autoencoder import Autoencoder
from russet.models.base import as_input
from russet.models.vae_blocks import Decoder, Encoder
from russet.models.vae_config import VAEConfig


class DiagonalGaussian:
    """Latents as the encoder gives them: independent normal distributions.

    Attributes:
        mean: [B, C, h, w].
        logvar: logarithm of the variance, from -30 to 20.
    """

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    def mode(self) -> Tensor:
        """The most likely latents."""
        return self.mean

    def sample(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Latents drawn at random, by one generator, or by one for each row.

        The noise is drawn in ``dtype`` where the generator is, by default the CPU, and then moved: with the same seed
        it is the same on every device. differs from Diffusers: without a generator that draws on the latents' device,
        and for half-precision latents in half precision.

        Raises:
            InputError: another number of generators than of rows.
        """
        if isinstance(generator, Sequence):
            if len(generator) != len(self.mean):
                raise InputError(f"{len(self.mean)} rows of latents need as many generators, not {len(generator)}")
            noise = torch.cat([_noise((1, *self.mean.shape[1:]), one, dtype) for one in generator])
        else:
            noise = _noise(tuple(self.mean.shape), generator, dtype)
        return self.mean + self.std * noise.to(self.mean.device, self.mean.dtype)


def _noise(shape: tuple[int, ...], generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


class EncoderOutput(NamedTuple):
    """``latent_dist``: the distribution of latents, not yet scaled by ``scaling_factor``."""

    latent_dist: DiagonalGaussian


class AutoencoderKL(Autoencoder):
    """The VAE of Stable Diffusion.

    Args:
        config: the config, as an object or a dict; ``changes`` are single values that win over it.

    Raises:
        ConfigError: the config cannot be built.
    """

    config_class: ClassVar[type[VAEConfig]] = VAEConfig
    config: VAEConfig

    def __init__(self, config: Mapping[str, Any] | None = None, **changes: Any) -> None:
        config = VAEConfig.of(config, changes)
        super().__init__(config)
        latents = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if config.use_post_quant_conv else None
        self.eval()

    def encode(self, x: Tensor, *, return_dict: bool = True) -> EncoderOutput | tuple[DiagonalGaussian]:
        """Pictures [B, C, H, W] from -1 to 1 as a distribution of latents.

        Raises:
            InputError: the shape does not fit.
        """
        self._check("pictures", x, self.config.in_channels, least=self.config.pixels_per_latent)
        latents = DiagonalGaussian(self._row_by_row(self._encode, x))
        return EncoderOutput(latents) if return_dict else (latents,)

    def _encode_whole(self, x: Tensor) -> Tensor:
        moments = self.encoder(as_input(x, self.dtype))  # a tile is part of a larger picture
        return moments if self.quant_conv is None else self.quant_conv(moments)  # type: ignore[no-any-return]

    def _decode_whole(self, z: Tensor) -> Tensor:
        z = as_input(z, self.dtype)
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.decoder(z)  # type: ignore[no-any-return]
