"""A text as the layers of a UNet read it, computed once a prompt where there is room for that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from russet.models.absorbed import Absorbed

if TYPE_CHECKING:
    from russet.models.transformer import MultiHeadAttention


class Text:
    """The encoded text [B, M, Dc], and what each layer makes of it, computed once a prompt.

    That is keys and values, or with ``absorbed`` both multiplied into the weights around them, where the layer's
    attention is torch's own: one that was chosen to take the scores apart, or to compute them in float32, has to.
    """

    def __init__(self, context: Tensor, readers: Iterable[MultiHeadAttention] = (), absorbed: bool = False) -> None:
        self.context = context
        self._made: dict[MultiHeadAttention, tuple[Tensor, Tensor]] = {}
        self._absorbed: dict[MultiHeadAttention, Absorbed] = {}
        for reader in readers:
            if absorbed and reader.absorbs:
                self._absorbed[reader] = reader.absorb(context)
            else:
                self._made[reader] = reader.keys_values(context)

    @property
    def rows(self) -> int:
        return len(self.context)

    def keys_values(self, reader: MultiHeadAttention) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, M, D] for one layer."""
        made = self._made.get(reader)
        return reader.keys_values(self.context) if made is None else made

    def absorbed(self, reader: MultiHeadAttention) -> Absorbed | None:
        """The text in one layer's weights; None where it is not."""
        return self._absorbed.get(reader)

    def tensors(self) -> list[Tensor]:
        """The text and all keys and values that were made of it."""
        return [self.context, *(tensor for pair in self._made.values() for tensor in pair)]

    def of(self, tensors: Sequence[Tensor]) -> Text:
        """The same for other tensors, in the order of ``tensors()``."""
        text = Text(tensors[0])
        text._made = dict(zip(self._made, zip(tensors[1::2], tensors[2::2], strict=True), strict=True))
        return text
