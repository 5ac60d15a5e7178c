"""The VAE's config, checked before anything is built from it."""

from __future__ import annotations

from dataclasses import dataclass

from russet.config import Config
from russet.models.activations import ACTIVATIONS

DOWN_BLOCK = "DownEncoderBlock2D"
UP_BLOCK = "UpDecoderBlock2D"
POSITIVE = (
    "in_channels",
    "out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
    "scaling_factor",
    "sample_size",
    "block_out_channels",
)


@dataclass(frozen=True, kw_only=True)
class VAEConfig(Config):
    """The JSON keys of ``AutoencoderKL``.

    Attributes:
        sample_size: pixels along a side of the pictures that it was trained on.
        scaling_factor: what latents are multiplied by to have about unit variance, before the UNet sees them.
        shift_factor: what is subtracted from latents before that; None for nothing.
        latents_mean: as ``shift_factor``, per channel; with ``latents_std`` in place of a single factor.
        force_upcast: whether it overflows in float16; for who chooses the dtype.

    Raises:
        ConfigError: a value that cannot be built, or lists whose lengths do not agree.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (DOWN_BLOCK,)
    up_block_types: tuple[str, ...] = (UP_BLOCK,)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def check(self) -> None:
        for name in POSITIVE:
            value = self[name]
            sizes = value if isinstance(value, tuple) else (value,)
            self.require(all(size > 0 for size in sizes), f"{name} must be positive, not {value!r}")
        blocks = len(self.block_out_channels)
        self.require(blocks > 0, "block_out_channels is empty")
        for name, known in (("down_block_types", DOWN_BLOCK), ("up_block_types", UP_BLOCK)):
            kinds = self[name]
            self.require(len(kinds) == blocks, f"{name} must have {blocks} entries, as block_out_channels has")
            self.require(set(kinds) == {known}, f"{name} {kinds!r} is not supported; only {known} is")
        for channels in self.block_out_channels:
            fits = channels % self.norm_num_groups == 0
            self.require(fits, f"{channels} channels cannot form norm_num_groups={self.norm_num_groups} equal groups")
        self.require(
            self.act_fn in ACTIVATIONS, f"act_fn {self.act_fn!r} is not supported; {', '.join(ACTIVATIONS)} are"
        )
        for name in ("latents_mean", "latents_std"):
            fits = self[name] is None or len(self[name]) == self.latent_channels
            self.require(fits, f"{name} must have {self.latent_channels} entries, one for each latent channel")

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along a side that one latent stands for: 8 in all published checkpoints."""
        return int(2 ** (len(self.block_out_channels) - 1))
