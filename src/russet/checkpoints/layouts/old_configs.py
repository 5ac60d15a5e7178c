"""Configs of older checkpoints that say what was never meant, put right when a Stable Diffusion pipeline is loaded.

Diffusers makes the same repairs in its Stable Diffusion 1 and 2 pipelines, and only there: a component that is loaded
by itself keeps what its file says.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any, TypeVar

from russet.config import Config, field_types

log = logging.getLogger(__name__)

AnyConfig = TypeVar("AnyConfig", bound=Config)

# Stable Diffusion was trained so; its first schedulers' configs left both at the defaults of their classes.
_SCHEDULER = {"steps_offset": 1, "clip_sample": False}


def repairs_apply(pipeline: str) -> bool:
    """Whether the configs of this pipeline, by its class name, are ones that were published with these faults."""
    return pipeline.startswith("StableDiffusion") and "XL" not in pipeline


def repaired(config: AnyConfig, where: str) -> AnyConfig:
    """The config of a scheduler or a UNet with the known faults put right, each reported in the log."""
    known = field_types(type(config))
    changes: dict[str, Any] = {key: value for key, value in _SCHEDULER.items() if key in known and config[key] != value}
    if "cross_attention_dim" in known and _older(config.get("_diffusers_version"), (0, 9)):
        size = config["sample_size"]
        if isinstance(size, int) and size < 64:
            changes["sample_size"] = 64
    for key, value in changes.items():
        log.info("%s: %s is %r in this old config; using %r", where, key, config[key], value)
    return dataclasses.replace(config, **changes)


def _older(version: Any, limit: tuple[int, int]) -> bool:
    match = re.match(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    return match is not None and (int(match[1]), int(match[2])) < limit
