"""What all autoencoders between pictures and latents share: working in tiles, row by row, and on checked shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from russet.config import Config
from russet.errors import InputError
from russet.models.base import Model, as_input, require_tensor
from russet.models.tiling import Tiling, tiled


class DecoderOutput(NamedTuple):
    """``sample`` [B, C, H, W]: pictures, about from -1 to 1."""

    sample: Tensor


class Autoencoder(Model):
    """An encoder of pictures [B, C, H, W] and a decoder of latents [B, Cz, h, w].

    A subclass says what they compute, by ``_encode_whole`` and ``_decode_whole``.
    """

    config: Any  # has latent_channels, sample_size, pixels_per_latent, and how latents are scaled

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.tiling: Tiling | None = None
        self.slicing = False

    def _encode_whole(self, x: Tensor) -> Tensor:
        """From pictures to what latents are made of."""
        raise NotImplementedError

    def _decode_whole(self, z: Tensor) -> Tensor:
        """From latents to pictures."""
        raise NotImplementedError

    def encode(self, x: Tensor, *, return_dict: bool = True) -> Any:
        """Pictures [B, C, H, W] from -1 to 1 as latents, or as a distribution of them."""
        raise NotImplementedError

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
        x = as_input(x, self.dtype)
        return torch.cat([process(row) for row in x.chunk(len(x))]) if self.slicing and len(x) > 1 else process(x)

    def _encode(self, x: Tensor) -> Tensor:
        unit = self.config.pixels_per_latent
        if self.tiling is None or self.tiling.fits(x.shape[2] // unit, x.shape[3] // unit):
            return self._encode_whole(x)
        return tiled(self._encode_whole, x, self.tiling, unit_in=unit, unit_out=1)

    def _decode(self, z: Tensor) -> Tensor:
        if self.tiling is None or self.tiling.fits(z.shape[2], z.shape[3]):
            return self._decode_whole(z)
        return tiled(self._decode_whole, z, self.tiling, unit_in=1, unit_out=self.config.pixels_per_latent)
