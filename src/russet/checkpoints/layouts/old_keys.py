"""Names that tensors had in older checkpoints, put right before they are compared with a model's.

1. VAE attention was ``….attentions.N.{query,key,value,proj_attn}``; in files converted from the authors' own layout
   these are 1×1 convolutions [C, C, 1, 1] instead of matrices [C, C].
2. ``position_ids`` were saved as a buffer of CLIP; they only count 0, 1, 2, … and may be wrong.
3. CLIP's inner ``text_model.`` and ``vision_model.`` prefixes come and go with the version of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from russet.checkpoints.formats.tensor_source import Derived, Source

_VAE_ATTENTION = re.compile(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)")
_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_POSITION_IDS = re.compile(r"(.*\.)?position_ids")
_CLIP_PREFIXES = ("text_model.", "vision_model.")


def renewed(sources: Mapping[str, Source], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Source]:
    """The same tensors under the names of a model that has ``wanted`` (name → shape).

    A name that the model has is never touched; one that no rule helps is left, for ``fill`` to report.
    """
    renewed: dict[str, Source] = {}
    for name, source in sources.items():
        if _POSITION_IDS.fullmatch(name) and name not in wanted:
            continue
        today = _today(name, wanted)
        shape = wanted.get(today)
        renewed[today] = _matrix(source) if shape and len(shape) == 2 and source.shape == (*shape, 1, 1) else source
    return renewed


def _today(name: str, wanted: Collection[str]) -> str:
    if name in wanted:
        return name
    candidates = []
    if match := _VAE_ATTENTION.fullmatch(name):
        candidates.append(f"{match[1]}{_VAE_NAMES[match[2]]}.{match[3]}")
    for prefix in _CLIP_PREFIXES:
        candidates += [prefix + name, name.removeprefix(prefix)]
    return next((candidate for candidate in candidates if candidate in wanted), name)


def _matrix(source: Source) -> Source:
    """A 1×1 convolution as the matrix that it is."""
    return Derived(source, source.shape[:2], lambda value: value[:, :, 0, 0])
