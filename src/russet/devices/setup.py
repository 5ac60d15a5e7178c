"""The memory-relevant part of a plan: what an estimate is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from russet.devices.choices import DTYPES, AttentionChoice, Tile


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way to do the work; the plan tries several, from the fastest to the most frugal."""

    dtypes: Mapping[str, str]
    unet_attention: AttentionChoice = field(default_factory=AttentionChoice)
    vae_attention: AttentionChoice = field(default_factory=AttentionChoice)
    text_attention: AttentionChoice = field(default_factory=AttentionChoice)
    micro_batch: int = 1
    vae_batch: int = 1
    vae_tile: Tile | None = None
    text_encoder: str = "device"
    offload: str | None = None
    drops: bool = True  # whether parked weights leave the memory that this estimate is about

    def width(self, component: str) -> int:
        """Bytes of one number in a component."""
        return DTYPES[self.dtypes[component]]
