"""Convolutional building blocks of the UNet and the VAE: the residual block, and changes of resolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from russet.backends.ops import convolution, hooked, resized
from russet.models.activations import ACTIVATIONS
from russet.models.base import Stepping
from russet.models.embeddings import paired
from russet.models.spare import Spare, taken
from russet.models.sums import Summing, shortcut_sum


@dataclass(frozen=True)
class ResnetStyle:
    """What all residual blocks of a network have in common.

    Attributes:
        groups: groups of each GroupNorm.
        eps: what each GroupNorm adds to the variance.
        act: name of the activation.
        time: features of the time embedding; None where there is no time (the VAE).
        scale_shift: whether time scales and shifts the second norm's output, rather than being added before it.
        divisor: what the output is divided by.
    """

    groups: int
    eps: float
    act: str = "silu"
    time: int | None = None
    scale_shift: bool = False
    divisor: float = 1.0


class Time:
    """The activated time embedding [B or 1, time], and what it adds to the channels of each residual block.

    made: by each block's projection, the latter where it was computed for all blocks together.
    """

    def __init__(self, emb: Tensor, made: Mapping[nn.Module, Tensor]) -> None:
        self.emb = emb
        self._made = made

    def apart(self) -> list[Time]:
        """Each row as a time of its own, for all rows of a later call."""
        parts = {projection: shifts.split(1) for projection, shifts in self._made.items()}  # type: ignore[no-untyped-call]
        return [
            Time(row, {projection: rows[i] for projection, rows in parts.items()})
            for i, row in enumerate(self.emb.split(1))  # type: ignore[no-untyped-call]
        ]

    def shift(self, projection: nn.Linear | None) -> tuple[Tensor | None, bool]:
        """What one block adds [B or 1, outputs], and whether its convolution's bias is part of that."""
        if projection is None:
            return None, False
        made = self._made.get(projection)
        return (projection(paired(self.emb))[: len(self.emb)], False) if made is None else (made, True)


class Resnet(Summing, Stepping):
    """Residual block: norm, activation, convolution, twice, added to the input (arXiv:2006.11239, appendix B)."""

    def __init__(self, inputs: int, outputs: int, style: ResnetStyle) -> None:
        super().__init__()
        self.act = ACTIVATIONS[style.act]
        self.scale_shift = style.scale_shift
        self.divisor = style.divisor
        self.norm1 = nn.GroupNorm(style.groups, inputs, style.eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = None
        if style.time is not None:
            self.time_emb_proj = nn.Linear(style.time, outputs * 2 if style.scale_shift else outputs)
        self.norm2 = nn.GroupNorm(style.groups, outputs, style.eps)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, given: Tensor | Spare, time: Time | None = None) -> Tensor:
        """From [B, Cin, h, w] and the time to [B, Cout, h, w]."""
        # What is overwritten below is a convolution's or a norm's own output, which neither needs for its gradient.
        steps, x = self.steps, taken(given)
        told, whole = (None, False) if time is None else time.shift(self.time_emb_proj)
        summed = self.sums is not None and len(self.sums.weight) == len(x)
        spare = isinstance(given, Spare) and steps.reuses and not summed and self._hidden(self.conv_shortcut)
        beside = self._beside(x) if spare else None  # early, so that the norm can take the memory of x
        h = steps.normed(x, self.norm1, self.act, spare=spare)
        x = x if beside is None else beside  # what is spare is free once it is convolved
        if self.scale_shift and told is not None:
            h = steps.normed(convolution(steps, h, self.conv1), self.norm2)
            scale, shift = told[:, :, None, None].chunk(2, dim=1)
            h = self.act(h * (1 + scale) + shift)
        else:
            h, rest = steps.convolved(h, self.conv1, told, whole=whole)
            h = steps.normed(h, self.norm2, self.act, rest, spare=self._hidden(self.conv1))
        if summed:
            h = self.sums.added(h, x)
        else:
            h, rest = steps.convolved(h, self.conv2)
            h = steps.added(h, self._beside(x) if beside is None else beside, rest)
        return h if self.divisor == 1 else h / self.divisor

    def _beside(self, x: Tensor) -> Tensor:
        """What the result is added to."""
        return x if self.conv_shortcut is None else convolution(self.steps, x, self.conv_shortcut)

    @staticmethod
    def _hidden(conv: nn.Conv2d | None) -> bool:
        """Whether there is such a convolution, and nobody else sees what goes through it and may keep that."""
        return conv is not None and not hooked(conv)

    def lay_sums(self, copies: int | None) -> None:
        self.sums = None if copies is None else shortcut_sum(self.conv2, self.conv_shortcut, copies)


class Downsample(Stepping):
    """Halves the resolution with a strided convolution; with ``padding`` 0 one row and column are added at the end."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return convolution(self.steps, x, self.conv)


class Upsample(Stepping):
    """Doubles the resolution, or brings it to ``size`` [h, w], by repeating pixels and convolving."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None or size == (x.shape[2] * 2, x.shape[3] * 2):
            return self.steps.doubled(x, self.conv)
        return resized(self.steps, x, self.conv, size)
