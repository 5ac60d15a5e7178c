"""A text as the layers of a UNet read it, computed once a prompt where there is room for that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from russet.models.absorbed import Absorbed

if TYPE_CHECKING:
    from russet.models.together import Together
    from russet.models.transformer import MultiHeadAttention


class Text:
    """The encoded text [B, M, Dc], and what each layer makes of it, computed once a prompt.

    That is keys and values, or with ``absorbed`` both multiplied into the weights around them, where the layer's
    attention is torch's own: one that was chosen to take the scores apart, or to compute them in float32, has to.
    """

    def __init__(
        self,
        context: Tensor,
        readers: Sequence[MultiHeadAttention] = (),
        absorbed: bool = False,
        together: Together | None = None,
    ) -> None:
        """together: the readers' layers for keys and values, in turn, whose weights may lie side by side."""
        self.context = context
        self._readers = readers
        self._product = None if together is None else together.product(context)
        self._made: dict[MultiHeadAttention, tuple[Tensor, Tensor]] = {}
        self._absorbed: dict[MultiHeadAttention, Absorbed] = {}
        for reader, keys, values in self._read():
            if absorbed and reader.absorbs:
                self._absorbed[reader] = reader.absorb(keys, values)
            else:
                self._made[reader] = reader.as_heads(keys, values)

    def _read(self) -> Iterator[tuple[MultiHeadAttention, Tensor, Tensor]]:
        """Each reader with what its layers make of the text, [B, M, C] twice."""
        start = 0
        for reader in self._readers:
            if self._product is None:
                yield reader, reader.to_k(self.context), reader.to_v(self.context)
                continue
            keys = self._product[..., start : (middle := start + reader.to_k.out_features)]
            values = self._product[..., middle : (start := middle + reader.to_v.out_features)]
            yield reader, keys, values

    @property
    def rows(self) -> int:
        return len(self.context)

    def keys_values(self, reader: MultiHeadAttention) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, M, D] for one layer."""
        made = self._made.get(reader)
        return reader.as_heads(reader.to_k(self.context), reader.to_v(self.context)) if made is None else made

    def absorbed(self, reader: MultiHeadAttention) -> Absorbed | None:
        """The text in one layer's weights; None where it is not."""
        return self._absorbed.get(reader)

    def tensors(self) -> list[Tensor]:
        """The text and all keys and values that were made of it."""
        if self._product is not None:
            return [self.context, self._product]
        return [self.context, *(tensor for pair in self._made.values() for tensor in pair)]

    def of(self, tensors: Sequence[Tensor]) -> Text:
        """The same for other tensors, in the order of ``tensors()``."""
        text = Text(tensors[0])
        if self._product is not None:
            text._readers, text._product = self._readers, tensors[1]
            text._made = {reader: reader.as_heads(keys, values) for reader, keys, values in text._read()}
            return text
        text._made = dict(zip(self._made, zip(tensors[1::2], tensors[2::2], strict=True), strict=True))
        return text
