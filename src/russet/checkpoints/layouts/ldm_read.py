"""One network out of a single file: built, and its tensors found in the file's, before any of them is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from russet.checkpoints.configs import Recipe
from russet.checkpoints.folder import find_class
from russet.checkpoints.formats.tensor_source import StoredTensor, TensorSource
from russet.checkpoints.formats.weight_files import Weights
from russet.checkpoints.layouts import ldm_keys, old_checkpoints
from russet.checkpoints.layouts.ldm_keys import LdmNetwork
from russet.checkpoints.load import EXTRA_TENSORS, PendingWeights
from russet.checkpoints.load_state_dict import build, check
from russet.config import Config
from russet.errors import CheckpointError, ConfigError, KeyMismatch

OTHER_CONFIGS = "Configs other than the bundled ones are given as config="


def pending_weights(
    part: LdmNetwork, weights: Weights, recipe: Recipe, *, averaged: bool = False, dtype: torch.dtype | None = None
) -> PendingWeights:
    """One network of the file, built and compared with its tensors, none of which is read yet.

    Args:
        part: which network; one without prefixes is a file of that network alone, with our own names.
        averaged: take the averaged copy of the UNet.
        dtype: that the network says it has until its weights are read.

    Raises:
        CheckpointError: the file does not have it.
        KeyMismatch: its tensors do not fit the config.
        ConfigError: the config cannot be built, or there is none.
    """
    where = f"{weights.where} ({part.component})"
    if (config := recipe.parts.get(part.component)) is None:
        raise ConfigError(f"{where}: there is no config for it; pass it in config=, or pass {part.component}=")
    target = find_class(ldm_keys.CLASSES[part.component], where).load()
    parsed = target.config_class.from_dict(config, where)
    if recipe.repair:
        parsed = old_checkpoints.repaired(parsed, where)
    try:
        model = build(target, parsed, 2 * len(weights.tensors) + EXTRA_TENSORS, dtype)  # twice: q, k, v
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        sources = find_tensors(part, weights, shapes, parsed, averaged=averaged)
        check(model, sources, where)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}. {OTHER_CONFIGS}") from None
    except KeyMismatch as error:
        raise KeyMismatch(f"{error} {OTHER_CONFIGS}") from None
    return PendingWeights(model, where, None, sources)


def find_tensors(
    part: LdmNetwork, weights: Weights, shapes: Mapping[str, tuple[int, ...]], config: Config, *, averaged: bool
) -> Mapping[str, TensorSource]:
    """The tensors for a network of ``shapes``, by our names."""
    if averaged and part.component == "unet":
        return averaged_tensors(part, weights, shapes, config)
    return tensors(part, weights, shapes, config) if part.prefixes else old_checkpoints.renamed(weights.tensors, shapes)


def tensors(
    part: LdmNetwork, weights: Weights, shapes: Mapping[str, tuple[int, ...]], config: Config
) -> dict[str, StoredTensor]:
    """Our tensors of one network as parts of the file's; the file's other tensors of this network, if they are not
    known to be unneeded, under the names that they have there, to be reported.
    """
    prefix = next((p for p in part.prefixes if any(name.startswith(p) for name in weights.tensors)), None)
    if prefix is None:
        raise CheckpointError(f"{weights.where} has no {part.component}; pass one as {part.component}=")
    places = ldm_keys.places(shapes, part.translate, config)
    keys = {name: prefix + place.key for name, place in places.items()}
    found = {
        name: place.cut(weights.tensors[keys[name]], shapes[name])
        for name, place in places.items()
        if keys[name] in weights.tensors
    }
    known, skipped = set(keys.values()), tuple(prefix + block for block in part.skipped_blocks(config))
    others = {
        key: tensor
        for key, tensor in weights.tensors.items()
        if key.startswith(prefix) and not (key in known or ldm_keys.ignored(key) or key.startswith(skipped))
    }
    return in_file_order(found | others)


def averaged_tensors(
    part: LdmNetwork, weights: Weights, shapes: Mapping[str, tuple[int, ...]], config: Config
) -> dict[str, StoredTensor]:
    """The same for the UNet's averaged copy, whose names have lost their dots."""
    places = ldm_keys.places(shapes, part.translate, config)
    keys = {name: ldm_keys.ema_key(place.key) for name, place in places.items()}
    if not any(key in weights.tensors for key in keys.values()):
        raise CheckpointError(f"{weights.where} has no averaged (EMA) weights; leave out extract_ema=True")
    return in_file_order(
        {
            name: place.cut(weights.tensors[keys[name]], shapes[name])
            for name, place in places.items()
            if keys[name] in weights.tensors
        }
    )


def in_file_order(found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Reading goes through the file from front to back, which disks like best."""
    return dict(sorted(found.items(), key=lambda item: item[1].offset))
