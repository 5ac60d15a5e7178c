"""Older checkpoints: names of tensors that have changed since, and configs with known faults.

Names, repaired before they are compared with a model's:

1. VAE attention was ``….attentions.N.{query,key,value,proj_attn}``; in files converted from the authors' own layout
   these are 1×1 convolutions [C, C, 1, 1] instead of matrices [C, C].
2. ``position_ids`` were saved as a buffer of CLIP; they only count 0, 1, 2, … and may be wrong.
3. CLIP's inner ``text_model.`` and ``vision_model.`` prefixes are there or not, by the version of transformers.

Diffusers repairs the configs too, in its Stable Diffusion 1 and 2 pipelines, and only there: a component that is loaded
by itself keeps what its file says.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from russet.checkpoints.formats.tensor_source import DerivedTensor, TensorSource
from russet.config import Config, field_types

log = logging.getLogger(__name__)

AnyConfig = TypeVar("AnyConfig", bound=Config)

_VAE_ATTENTION = re.compile(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)")
_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_POSITION_IDS = re.compile(r"(.*\.)?position_ids")
_CLIP_PREFIXES = ("text_model.", "vision_model.")

# Stable Diffusion was trained with these; its first schedulers' configs left both at the defaults of their classes.
_SCHEDULER = {"steps_offset": 1, "clip_sample": False}


def renamed(sources: Mapping[str, TensorSource], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, TensorSource]:
    """The same tensors under the names of a model that has ``wanted`` (name → shape).

    A name that the model has is never changed; one that no rule fits is kept, for the strict comparison to report.
    """
    result: dict[str, TensorSource] = {}
    for old, source in sources.items():
        if _POSITION_IDS.fullmatch(old) and old not in wanted:
            continue
        name = _current_name(old, wanted)
        shape = wanted.get(name)
        if shape and len(shape) == 2 and source.shape == (*shape, 1, 1):
            source = DerivedTensor(source, source.shape[:2], lambda value: value[:, :, 0, 0])
        result[name] = source
    return result


def _current_name(name: str, wanted: Collection[str]) -> str:
    if name in wanted:
        return name
    candidates = []
    if match := _VAE_ATTENTION.fullmatch(name):
        candidates.append(f"{match[1]}{_VAE_NAMES[match[2]]}.{match[3]}")
    for prefix in _CLIP_PREFIXES:
        candidates += [prefix + name, name.removeprefix(prefix)]
    return next((candidate for candidate in candidates if candidate in wanted), name)


def repairs_apply(pipeline: str) -> bool:
    """Whether configs of this pipeline, by its class name, were published with the known faults."""
    return pipeline.startswith("StableDiffusion") and "XL" not in pipeline


def repaired(config: AnyConfig, where: str) -> AnyConfig:
    """The config of a scheduler or a UNet with the known faults repaired, each reported in the log."""
    known = field_types(type(config))
    changes: dict[str, Any] = {key: value for key, value in _SCHEDULER.items() if key in known and config[key] != value}
    if "cross_attention_dim" in known and _is_before_0_9(config.get("_diffusers_version")):
        size = config["sample_size"]
        if isinstance(size, int) and size < 64:
            changes["sample_size"] = 64
    for key, value in changes.items():
        log.info("%s: %s is %r in this old config; using %r", where, key, config[key], value)
    return dataclasses.replace(config, **changes) if changes else config


def _is_before_0_9(version: Any) -> bool:
    match = re.match(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    return match is not None and (int(match[1]), int(match[2])) < (0, 9)
