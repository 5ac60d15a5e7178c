"""Decisions with their reasons, and a set of them that reads by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from typing_extensions import Self

from russet.planning.plan_types import DTYPES, AttentionChoice, Tile


@dataclass(frozen=True)
class Decision:
    """One decision: ``value`` as ``choices.MEANING[name]`` says, ``reason`` in words, ``by`` whom."""

    name: str
    value: Any
    reason: str
    by: Literal["plan", "user"] = "plan"

    def __str__(self) -> str:
        return f"{self.name}: {spelled(self.value)} ({'as asked; ' if self.by == 'user' else ''}{self.reason})"


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """Some decisions; ``found["micro_batch"]`` is the value of one. A name that was not decided raises KeyError."""

    decisions: tuple[Decision, ...]

    def __getitem__(self, name: str) -> Any:
        return self.why(name).value

    def why(self, name: str) -> Decision:
        """A decision with its reason."""
        return {decision.name: decision for decision in self.decisions}[name]

    def and_also(self, more: Iterable[Decision]) -> Self:
        """These decisions and more."""
        return type(self)(decisions=(*self.decisions, *more))

    def dtype(self, component: str) -> str:
        """The torch dtype's name for ``"text_encoder"``, ``"unet"``, ``"vae"`` or ``"safety_checker"``."""
        return cast(str, self[f"dtype.{component}"])

    def width(self, component: str) -> int:
        """Bytes of one number in a component."""
        return DTYPES[self.dtype(component)]

    def attention(self, component: str) -> AttentionChoice:
        """The attention for ``"text_encoder"``, ``"unet"`` or ``"vae"``."""
        return cast(AttentionChoice, self[f"attention.{component}"])

    @property
    def micro_batch(self) -> int:
        return cast(int, self["micro_batch"])

    @property
    def vae_batch(self) -> int:
        return cast(int, self["vae_batch"])

    @property
    def vae_tile(self) -> Tile | None:
        return cast("Tile | None", self["vae_tile"])

    @property
    def text_encoder(self) -> str:
        return cast(str, self["text_encoder"])

    @property
    def offload(self) -> str | None:
        return cast("str | None", self["offload"])

    @property
    def idle_weights(self) -> str:
        return cast(str, self["idle_weights"])

    @property
    def memory_format(self) -> str:
        return cast(str, self["memory_format"])

    @property
    def priming(self) -> bool:
        return cast(bool, self["priming"])

    @property
    def environment(self) -> Mapping[str, str]:
        """Environment variables to set before the device is first used, unless the user has set any of them."""
        return allocator_variables(self["watermark"])


def allocator_variables(watermark: tuple[float, float] | None) -> Mapping[str, str]:
    """A watermark decision as torch reads it from the environment."""
    if watermark is None:
        return {}
    high, low = watermark
    return {"PYTORCH_MPS_HIGH_WATERMARK_RATIO": str(high), "PYTORCH_MPS_LOW_WATERMARK_RATIO": str(low)}


def settled(user: Mapping[str, Any], name: str, value: Any, reason: str, note: str = "your choice") -> Decision:
    """The user's value where there is one, with ``note``; else the plan's value, with its reason."""
    if name in user:
        return Decision(name, user[name], note, by="user")
    return Decision(name, value, reason)


def spelled(value: Any) -> str:
    """A decision's value as a person reads it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def gigabytes(size: float) -> str:
    """Bytes as a person reads them, rounded upward: ``"2.87 GB"`` (10⁹ bytes)."""
    return f"{math.ceil(size / 1e7) / 100:.2f} GB"
