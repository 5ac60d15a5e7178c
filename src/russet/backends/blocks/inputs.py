"""What the blocks are given besides a map: the text and the time, with what was computed of them beforehand."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from russet.models.transformer import Attention


class Context:
    """A text [R, M, Dc] for the layers that attend to it. R is a multiple of the rows of the map: each row is asked
    about several texts, the first text of all rows first, and what comes before the first such layer is computed once.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @staticmethod
    def of(context: Tensor | Context) -> Context:
        return context if isinstance(context, Context) else Context(context)

    @property
    def rows(self) -> int:
        return len(self.tensor)

    def keys_values(self, layer: Attention) -> tuple[Tensor, Tensor]:
        """Keys and values [R, H, M, D] for one layer."""
        return layer.split_heads(layer.to_k(self.tensor)), layer.split_heads(layer.to_v(self.tensor))

    def folded(self, layer: Attention) -> FoldedAttention | None:
        """The text multiplied into one layer's weights; None where it is not."""
        return None


class FoldedAttention:
    """Attention to a text that was multiplied into the weights around it."""

    def added(self, x: Tensor, normed: Tensor) -> Tensor:
        """``x`` [R, N, C] plus what the texts contribute to ``normed`` [R, N, C], or [1, N, C] for all."""
        raise NotImplementedError


class TimeShifts:
    """The activated time embedding [B or 1, D], and what it adds to the channels of residual blocks.

    by_projection: a block's projection → its output [B or 1, C] with the bias of the convolution that it is added to,
    where that was computed for all blocks together.
    """

    def __init__(self, emb: Tensor, by_projection: Mapping[nn.Module, Tensor] | None = None) -> None:
        self.emb = emb
        self._by_projection = by_projection or {}

    @property
    def rows(self) -> int:
        return len(self.emb)

    def split(self) -> list[TimeShifts]:
        """Each row as the shifts of one time."""
        parts = {layer: shifts.split(1) for layer, shifts in self._by_projection.items()}  # type: ignore[no-untyped-call]
        return [
            TimeShifts(row, {layer: rows[i] for layer, rows in parts.items()})
            for i, row in enumerate(self.emb.split(1))  # type: ignore[no-untyped-call]
        ]

    def shift(self, projection: nn.Linear | None) -> tuple[Tensor | None, bool]:
        """What one block adds [B or 1, C], and whether its convolution's bias is part of that."""
        if projection is None:
            return None, False
        known = self._by_projection.get(projection)
        return (projection(self.emb), False) if known is None else (known, True)


def plain_time(emb: Tensor | TimeShifts) -> Tensor:
    """The time as a plain block takes it."""
    return emb.emb if isinstance(emb, TimeShifts) else emb
