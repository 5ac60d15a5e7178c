"""A small autoencoder of plain convolutions, for previews and small devices: TAESD's architecture.

Its latents are those of the Stable Diffusion that it was distilled for. It has no attention and no norms; its decoder
has 1.2 million parameters where Stable Diffusion's has 49.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from russet.config import Config
from russet.models.activations import ACTIVATIONS, Activation
from russet.models.autoencoder import Autoencoder

UPSAMPLING = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True, kw_only=True)
class TinyVAEConfig(Config):
    """The JSON keys of ``AutoencoderTiny``.

    Attributes:
        encoder_block_out_channels, decoder_block_out_channels: features of each level, the same in all of a network.
        num_encoder_blocks, num_decoder_blocks: residual blocks of each level.
        upsampling_scaling_factor, upsample_fn: by how much and how the decoder enlarges from level to level.
        latent_magnitude, latent_shift: where ``scale_latents`` puts 0..1.
        scaling_factor, shift_factor: as for ``AutoencoderKL``; this network usually takes latents as the UNet has them.

    Raises:
        ConfigError: a value that cannot be built, or lists whose lengths do not agree.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    force_upcast: bool = False
    scaling_factor: float = 1.0
    shift_factor: float | None = 0.0

    latents_mean: ClassVar[None] = None
    latents_std: ClassVar[None] = None
    sample_size: ClassVar[int] = 512

    def check(self) -> None:
        for name in ("in_channels", "out_channels", "latent_channels", "upsampling_scaling_factor", "latent_magnitude"):
            self.require(self[name] > 0, f"{name} must be positive, not {self[name]!r}")
        self.require(self.scaling_factor > 0, f"scaling_factor must be positive, not {self.scaling_factor!r}")
        for side in ("encoder", "decoder"):
            channels, blocks = self[f"{side}_block_out_channels"], self[f"num_{side}_blocks"]
            self.require(len(channels) > 0, f"{side}_block_out_channels is empty")
            same = len(blocks) == len(channels)
            self.require(same, f"num_{side}_blocks must have {len(channels)} entries, as {side}_block_out_channels has")
            self.require(min(channels) > 0 and min(blocks) >= 0, f"the {side}'s {channels} and {blocks} are too small")
            self.require(len(set(channels)) == 1, f"{side}_block_out_channels must all be the same, not {channels}")
        factors = 2 ** (len(self.encoder_block_out_channels) - 1), self.pixels_per_latent
        self.require(factors[0] == factors[1], f"the encoder reduces by {factors[0]}, the decoder enlarges otherwise")
        for name, known in (("act_fn", tuple(ACTIVATIONS)), ("upsample_fn", UPSAMPLING)):
            self.require(self[name] in known, f"{name} {self[name]!r} is not supported; {', '.join(known)} are")

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along a side that one latent stands for."""
        return int(self.upsampling_scaling_factor ** (len(self.decoder_block_out_channels) - 1))


class LatentsOutput(NamedTuple):
    """``latents`` [B, Cz, h, w], not yet scaled by ``scaling_factor``."""

    latents: Tensor


class Activated(nn.Module):
    """An activation as a module, so that what follows it in a list has the checkpoint's number."""

    def __init__(self, act: Activation) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class Block(nn.Module):
    """Three convolutions, added to their input, and a ReLU."""

    def __init__(self, channels: int, act: Activation) -> None:
        super().__init__()
        first, second, third = (convolution(channels, channels) for _ in range(3))
        self.conv = nn.Sequential(first, Activated(act), second, Activated(act), third)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """From pictures to latents."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        act, channels = ACTIVATIONS[config.act_fn], config.encoder_block_out_channels[0]
        first, *lower = config.num_encoder_blocks
        layers: list[nn.Module] = [convolution(config.in_channels, channels)]
        layers += [Block(channels, act) for _ in range(first)]
        for blocks in lower:
            layers += [convolution(channels, channels, stride=2, bias=False)]
            layers += [Block(channels, act) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, convolution(channels, config.latent_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x + 1) / 2)  # type: ignore[no-any-return]


class TinyDecoder(nn.Module):
    """From latents to pictures. Latents are softly held within ±3 first."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        act, channels = ACTIVATIONS[config.act_fn], config.decoder_block_out_channels[0]
        *lower, last = config.num_decoder_blocks
        layers: list[nn.Module] = [convolution(config.latent_channels, channels), Activated(act)]
        for blocks in lower:
            layers += [Block(channels, act) for _ in range(blocks)]
            layers += [nn.Upsample(scale_factor=config.upsampling_scaling_factor, mode=config.upsample_fn)]
            layers += [convolution(channels, channels, bias=False)]
        layers += [Block(channels, act) for _ in range(last)]
        self.layers = nn.Sequential(*layers, convolution(channels, config.out_channels))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(torch.tanh(z / 3) * 3) * 2 - 1  # type: ignore[no-any-return]


def convolution(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride, bias=bias)


class AutoencoderTiny(Autoencoder):
    """A tiny autoencoder: ``pipe.vae = AutoencoderTiny.from_pretrained(…)``, or for previews, ``pipe.preview(…)``.

    Args:
        config: the config, as an object or a dict; ``changes`` are single values that win over it.

    Raises:
        ConfigError: the config cannot be built.
    """

    config_class: ClassVar[type[TinyVAEConfig]] = TinyVAEConfig
    config: TinyVAEConfig

    def __init__(self, config: Mapping[str, Any] | None = None, **changes: Any) -> None:
        config = TinyVAEConfig.of(config, changes)
        super().__init__(config)
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)
        self.eval()

    def encode(self, x: Tensor, *, return_dict: bool = True) -> LatentsOutput | tuple[Tensor]:
        """Pictures [B, C, H, W] from -1 to 1 as latents [B, Cz, h, w].

        Raises:
            InputError: the shape does not fit.
        """
        self._check("pictures", x, self.config.in_channels, least=self.config.pixels_per_latent)
        latents = self._row_by_row(self._encode, x)
        return LatentsOutput(latents) if return_dict else (latents,)

    def scale_latents(self, x: Tensor) -> Tensor:
        """Latents from about ±``latent_magnitude`` to 0..1, so that they can be stored as a picture."""
        return (x / (2 * self.config.latent_magnitude) + self.config.latent_shift).clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """The way back from ``scale_latents``."""
        return (x - self.config.latent_shift) * (2 * self.config.latent_magnitude)

    def _encode_whole(self, x: Tensor) -> Tensor:
        return self.encoder(x)  # type: ignore[no-any-return]

    def _decode_whole(self, z: Tensor) -> Tensor:
        return self.decoder(z)  # type: ignore[no-any-return]
