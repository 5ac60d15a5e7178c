"""The autoencoder between pictures and the latents that the UNet works on (arXiv:2112.10752, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from russet.errors import InputError
from russet.models.base import Model, require_tensor
from russet.models.tiling import Tiling, tiled
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

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Latents drawn at random, by one generator, or by one for each row.

        The noise is float32 from where the generator is, by default the CPU, and then moved: with the same seed it is
        the same on every device. differs from Diffusers: without a generator that draws on the latents' device, and
        for half-precision latents in half precision.

        Raises:
            InputError: another number of generators than of rows.
        """
        if isinstance(generator, Sequence):
            if len(generator) != len(self.mean):
                raise InputError(f"{len(self.mean)} rows of latents need as many generators, not {len(generator)}")
            noise = torch.cat([_noise((1, *self.mean.shape[1:]), one) for one in generator])
        else:
            noise = _noise(tuple(self.mean.shape), generator)
        return self.mean + self.std * noise.to(self.mean.device, self.mean.dtype)


def _noise(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)


class EncoderOutput(NamedTuple):
    """``latent_dist``: the distribution of latents, not yet scaled by ``scaling_factor``."""

    latent_dist: DiagonalGaussian


class DecoderOutput(NamedTuple):
    """``sample`` [B, C, H, W]: pictures, about from -1 to 1."""

    sample: Tensor


class AutoencoderKL(Model):
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
        self.tiling: Tiling | None = None
        self.slicing = False
        self.eval()

    def encode(self, x: Tensor, *, return_dict: bool = True) -> EncoderOutput | tuple[DiagonalGaussian]:
        """Pictures [B, C, H, W] from -1 to 1 as a distribution of latents.

        Raises:
            InputError: the shape does not fit.
        """
        self._check("pictures", x, self.config.in_channels, least=self.config.pixels_per_latent)
        latents = DiagonalGaussian(self._row_by_row(self._encode, x))
        return EncoderOutput(latents) if return_dict else (latents,)

    def decode(self, z: Tensor, *, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pictures [B, C, H, W] from latents [B, Cz, h, w] that are no longer scaled.

        Raises:
            InputError: the shape does not fit.
        """
        self._check("latents", z, self.config.latent_channels, least=1)
        pictures = self._row_by_row(self._decode, z)
        return DecoderOutput(pictures) if return_dict else (pictures,)

    def enable_tiling(self, tile: int | None = None, overlap: int | None = None) -> None:
        """Works on pictures larger than ``tile`` in tiles, so that memory does not grow with them.

        Args:
            tile: side in pixels; by default that of the pictures it was trained on.
            overlap: what neighbouring tiles share at least, in pixels; by default a quarter of a tile.

        Raises:
            InputError: sizes that are no multiples of a latent's, or an overlap that is not smaller than the tile.
        """
        unit = self.config.pixels_per_latent
        for name, pixels in (("tile", tile), ("overlap", overlap)):
            if pixels is not None and (type(pixels) is not int or pixels < unit or pixels % unit):
                raise InputError(f"{name} must be a multiple of {unit} pixels, not {pixels!r}")
        trained = self.config.sample_size
        default = max(2 * unit, min(trained) if isinstance(trained, tuple) else trained)
        size = (default if tile is None else tile) // unit
        self.tiling = Tiling(size, max(1, size // 4) if overlap is None else overlap // unit)

    def disable_tiling(self) -> None:
        """Works on every picture as a whole again."""
        self.tiling = None

    def enable_slicing(self) -> None:
        """Works on the pictures of a batch one after another, so that memory does not grow with the batch."""
        self.slicing = True

    def disable_slicing(self) -> None:
        """Works on all pictures of a batch at once again."""
        self.slicing = False

    def _check(self, what: str, x: Tensor, channels: int, least: int) -> None:
        require_tensor(what, x)
        if x.ndim != 4 or x.shape[1] != channels or min(x.shape) < 1 or min(x.shape[2:]) < least:
            raise InputError(f"{what} must have the shape [B, {channels}, H, W] with sides ≥ {least}: {list(x.shape)}")

    def _row_by_row(self, process: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([process(row) for row in x.chunk(len(x))]) if self.slicing and len(x) > 1 else process(x)

    def _encode(self, x: Tensor) -> Tensor:
        unit = self.config.pixels_per_latent
        if self.tiling is None or self.tiling.fits(x.shape[2] // unit, x.shape[3] // unit):
            return self._encode_whole(x)
        return tiled(self._encode_whole, x, self.tiling, unit_in=unit, unit_out=1)

    def _encode_whole(self, x: Tensor) -> Tensor:
        moments = self.encoder(x)
        return moments if self.quant_conv is None else self.quant_conv(moments)  # type: ignore[no-any-return]

    def _decode(self, z: Tensor) -> Tensor:
        if self.tiling is None or self.tiling.fits(z.shape[2], z.shape[3]):
            return self._decode_whole(z)
        return tiled(self._decode_whole, z, self.tiling, unit_in=1, unit_out=self.config.pixels_per_latent)

    def _decode_whole(self, z: Tensor) -> Tensor:
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.decoder(z)  # type: ignore[no-any-return]
