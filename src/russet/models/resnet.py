"""Convolutional building blocks of the UNet and the VAE: the residual block, and changes of resolution."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from russet.models.activations import ACTIVATIONS


@dataclass(frozen=True)
class ResnetStyle:
    """What all residual blocks of a network have in common.

    Attributes:
        groups: groups of each GroupNorm.
        eps: what each GroupNorm adds to the variance.
        act: name of the activation.
        time: features of the time embedding; None where there is no time (the VAE).
        scale_shift: whether the time embedding scales and shifts the second norm's output, rather than being added
            before it.
        output_scale_factor: what the output is divided by.
    """

    groups: int
    eps: float
    act: str = "silu"
    time: int | None = None
    scale_shift: bool = False
    output_scale_factor: float = 1.0


class ResnetBlock2D(nn.Module):
    """Residual block: norm, activation, convolution, twice, added to the input (arXiv:2006.11239, appendix B)."""

    def __init__(self, inputs: int, outputs: int, style: ResnetStyle) -> None:
        super().__init__()
        self.act = ACTIVATIONS[style.act]
        self.scale_shift = style.scale_shift
        self.output_scale_factor = style.output_scale_factor
        self.norm1 = nn.GroupNorm(style.groups, inputs, style.eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = None
        if style.time is not None:
            self.time_emb_proj = nn.Linear(style.time, outputs * 2 if style.scale_shift else outputs)
        self.norm2 = nn.GroupNorm(style.groups, outputs, style.eps)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """From [B, Cin, h, w] and the activated time embedding [B or 1, D] to [B, Cout, h, w]."""
        h = self.conv1(self.act(self.norm1(x)))
        if emb is None or self.time_emb_proj is None:
            h = self.norm2(h)
        elif self.scale_shift:  # arXiv:2105.05233, section 3
            scale, shift = self.time_emb_proj(emb)[:, :, None, None].chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + self.time_emb_proj(emb)[:, :, None, None])
        h = self.conv2(self.act(h))
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = x + h
        return x if self.output_scale_factor == 1 else x / self.output_scale_factor


class Downsample2D(nn.Module):
    """Halves the resolution with a strided convolution; with ``padding`` 0 one row and column are added at the end."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample2D(nn.Module):
    """Doubles the resolution, or brings it to ``size`` (h, w), by repeating pixels and convolving."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = (2 * x.shape[2], 2 * x.shape[3]) if size is None else size
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # type: ignore[no-any-return]
