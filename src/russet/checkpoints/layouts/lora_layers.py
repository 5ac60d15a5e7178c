"""Which layers of a model a LoRA may change, under all the names that LoRA files have for them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from russet.checkpoints import configs
from russet.checkpoints.folder import find_class
from russet.checkpoints.layouts import ldm_keys
from russet.checkpoints.layouts.lora_names import Change
from russet.checkpoints.load_state_dict import build

MODELS = {"sd1": "sd1", "sd2": "sd2-base", "sdxl": "sdxl", "sdxl-refiner": "sdxl-refiner"}  # family → bundled configs


def unknown_layers(found: list[Change], family: str) -> list[str]:
    """The layers that a LoRA changes and the models of ``family`` do not have."""
    known = layers(family)
    return sorted({f"{c.network}: {c.layer}" for c in found if c.layer not in known.get(c.network, frozenset())})


@functools.cache
def layers(family: str) -> Mapping[str, frozenset[str]]:
    """Network → its linear and convolution layers, dots as underscores; a UNet's under LDM's names too."""
    recipe = configs.bundled(MODELS[family])
    return {
        name: names(name, config)
        for name, config in recipe.parts.items()
        if config is not None and (name == "unet" or name.startswith("text_encoder"))
    }


def names(network: str, config: Mapping[str, Any]) -> frozenset[str]:
    target = find_class(ldm_keys.CLASSES[network], network).load()
    parsed = target.config_class.from_dict(config)
    found = {
        name for name, module in build(target, parsed).named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    if network == "unet":
        found |= {ldm_keys.unet(f"{name}.weight", parsed).key.removesuffix(".weight") for name in found}
    return frozenset(name.replace(".", "_") for name in found)
