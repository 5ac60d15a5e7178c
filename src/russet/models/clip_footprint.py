"""The memory that a CLIP tower takes."""

from __future__ import annotations

from russet.models.clip_text import CLIPTextConfig
from russet.models.clip_vision import CLIPVisionConfig
from russet.models.footprint import Arithmetic, Attended, Walk


def tower_peak(t: CLIPTextConfig | CLIPVisionConfig, rows: int, how: Arithmetic) -> int:
    """Peak of a CLIP tower on ``rows`` sequences: all layers' outputs are kept, and the last one's work beside them."""
    walk = Walk(rows, how, {})
    tokens = t.max_position_embeddings if isinstance(t, CLIPTextConfig) else (t.image_size // t.patch_size) ** 2 + 1
    x = walk.map(tokens, t.hidden_size)
    mask = tokens * tokens * how.width if isinstance(t, CLIPTextConfig) else 0
    walk.held = (t.num_hidden_layers + 1) * x + mask
    call = Attended.own(rows, t.num_attention_heads, tokens, t.hidden_size)
    walk.moment(4 * x, call.scratch(how.attention, how.width))
    walk.moment(x, 3 * walk.map(tokens, t.intermediate_size))
    return walk.peak
