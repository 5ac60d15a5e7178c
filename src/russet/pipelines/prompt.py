"""From prompts to what the denoiser is conditioned on."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from russet.models.clip_text import CLIPTextModel
from russet.tokenizer import CLIPTokenizer

log = logging.getLogger(__name__)


def encode(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, texts: Sequence[str], clip_skip: int = 0) -> Tensor:
    """Encodes texts → [B, N, D], N the tokenizer's full length (77), each text padded or cut to it.

    clip_skip: how many of the last layers to leave out; the final norm is applied all the same. A text that does not
    fit is cut, with a warning that shows what was lost.
    """
    for text in texts:
        if lost := tokenizer.cut(text):
            log.warning(
                "the prompt is longer than the %d tokens that the model reads; this part is ignored: %r",
                tokenizer.model_max_length,
                lost,
            )
    ids = tokenizer(list(texts)).input_ids.to(text_encoder.device)
    if clip_skip == 0:
        encoded: Tensor = text_encoder(ids).last_hidden_state
    else:
        hidden = text_encoder(ids, output_hidden_states=True).hidden_states
        encoded = text_encoder.text_model.final_layer_norm(hidden[-1 - clip_skip])
    return encoded
