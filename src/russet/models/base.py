"""What all networks share: a config, a dtype, a device, and attention that is handed to them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from russet.component import Component
from russet.config import Config
from russet.errors import ArgumentTypeError
from russet.models.attention import AttentionFunction, fused


def require_tensor(name: str, value: object) -> None:
    """Raises ArgumentTypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name} must be a tensor, not {type(value).__name__}")


def as_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a network's precision, contiguous in either memory format.

    Some devices misread a part of the channels of a larger map (pytorch#169342), and some end the process where one
    operation meets two precisions (pytorch#121025).
    """
    x = x.to(dtype)
    in_order = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x if in_order else x.contiguous()


class Attending(nn.Module):
    """A module that computes attention by the function in ``attention``, which ``Model.set_attention`` replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: AttentionFunction = fused


class Model(nn.Module, Component):
    """A network with a config. Its parameters carry the names of the published checkpoints."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @functools.cached_property
    def size(self) -> int:
        """How many numbers the parameters are."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def set_attention(self, attention: AttentionFunction) -> None:
        """Makes every attention layer beneath compute by ``attention``, a function of ``russet.models.attention``.

        Raises:
            ArgumentTypeError: ``attention`` cannot be called.
        """
        if not callable(attention):
            raise ArgumentTypeError(f"attention must be a function of russet.models.attention, not {attention!r}")
        for module in self.modules():
            if isinstance(module, Attending):
                module.attention = attention
