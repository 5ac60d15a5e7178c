"""The walk through a CLIP tower against exact counts of the bytes that it keeps alive."""

from __future__ import annotations

import pytest
import torch

from russet.models.clip_footprint import tower_peak
from russet.models.clip_text import CLIPTextModel
from russet.models.footprint import Arithmetic

from .footprints import ATTENTIONS, peak_of, require_predicted


@pytest.mark.parametrize("attention", ["fused", "chunked"])
@pytest.mark.parametrize("width", [128, 320])
def test_a_text_encoder_peaks_as_predicted(attention: str, width: int) -> None:
    if attention not in ATTENTIONS:
        pytest.skip("this torch has no fused attention")
    config = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 6, "vocab_size": 100}
    text, (choice, function) = CLIPTextModel(config), ATTENTIONS[attention]
    text.set_attention(function)
    ids = torch.ones(2, 77, dtype=torch.long)
    counted = peak_of(lambda: text(ids))
    require_predicted(tower_peak(text.config, 2, Arithmetic(attention=choice)), counted)
