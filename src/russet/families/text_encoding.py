"""From texts to what a CLIP text encoder makes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from russet.backends.cuda.graphs import Graphs, identity
from russet.models.clip_text import CLIPTextModel
from russet.text.tokenizer import CLIPTokenizer

log = logging.getLogger(__name__)

SHOWN = 2000  # characters of a text that is ignored, in the warning about it

Encode = Callable[[Tensor], tuple[Tensor, ...]]
"""Token ids [B, N] → tensors with a row for each."""


def last_hidden_state(encoder: CLIPTextModel, clip_skip: int) -> Encode:
    """[B, N, D] of the last layer, or of one that many layers before it; the final norm is applied all the same."""

    def encode(ids: Tensor) -> tuple[Tensor]:
        if clip_skip == 0:
            return (encoder(ids).last_hidden_state,)
        hidden = encoder(ids, output_hidden_states=True).hidden_states
        return (encoder.text_model.final_layer_norm(hidden[-1 - clip_skip]),)

    return encode


def encode_distinct(
    tokenizer: CLIPTokenizer,
    encoder: Any,
    texts: Sequence[str],
    encode: Encode,
    name: Hashable,
    graphs: Graphs | None = None,
) -> list[tuple[Tensor, ...]]:
    """What ``encode`` gives for each text: each distinct one is encoded once, and all of them together.

    A text is padded or cut to the tokenizer's full length (77); a warning shows what is lost.

    graphs: calls are recorded there, ``name`` telling different ``encode`` functions of one encoder apart.
    """
    distinct = list(dict.fromkeys(texts))
    for text in distinct:
        if lost := tokenizer.cut(text):
            log.warning(
                "the prompt is longer than the %d tokens that the model reads; this part is ignored: %r",
                tokenizer.model_max_length,
                lost if len(lost) <= SHOWN else f"{lost[:SHOWN]}… ({len(lost):,} characters)",
            )
    ids = tokenizer(distinct).input_ids.to(encoder.device)
    network = None if graphs is None else identity(encoder)
    if graphs is None or network is None:
        outputs = encode(ids)
    else:
        outputs = graphs.run((network, name), encode, [ids])
    places = [distinct.index(text) for text in texts]
    return [tuple(output[place] for output in outputs) for place in places]
