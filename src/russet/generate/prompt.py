"""From prompts to what the denoiser is conditioned on."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from russet.backends.cuda.graphs import Graphs, identity
from russet.models.clip_text import CLIPTextModel
from russet.text.tokenizer import CLIPTokenizer

log = logging.getLogger(__name__)

SHOWN = 2000  # characters of a text that is ignored, in the warning about it


def encode(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    texts: Sequence[str],
    clip_skip: int = 0,
    graphs: Graphs | None = None,
) -> Tensor:
    """Encodes texts → [B, N, D], N the tokenizer's full length (77), each text padded or cut to it.

    clip_skip: how many of the last layers to leave out; the final norm is applied all the same. A text that does not
    fit is cut, with a warning that shows what was lost. graphs: the text encoder's calls are recorded there.
    """
    for text in texts:
        if lost := tokenizer.cut(text):
            log.warning(
                "the prompt is longer than the %d tokens that the model reads; this part is ignored: %r",
                tokenizer.model_max_length,
                lost if len(lost) <= SHOWN else f"{lost[:SHOWN]}… ({len(lost):,} characters)",
            )
    ids = tokenizer(list(texts)).input_ids.to(text_encoder.device)

    def call(ids: Tensor) -> tuple[Tensor]:
        if clip_skip == 0:
            return (text_encoder(ids).last_hidden_state,)
        hidden = text_encoder(ids, output_hidden_states=True).hidden_states
        return (text_encoder.text_model.final_layer_norm(hidden[-1 - clip_skip]),)

    name = None if graphs is None else identity(text_encoder)
    (encoded,) = call(ids) if graphs is None or name is None else graphs.run((name, clip_skip), call, [ids])
    return encoded
