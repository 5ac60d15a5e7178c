"""Single files: a whole model in one .safetensors or .ckpt, with the tensor names of its authors' code (LDM, SGM).

What the file is shows in its tensors (``kinds``); where each of ours lies is a map (``ldm_keys``); what no tensor can
say, the configs, is bundled (``configs``). As with folders, everything is checked before the first weight is read.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from russet.checkpoints import configs, fill, kinds, ldm_keys
from russet.checkpoints.classes import COMPONENTS, find
from russet.checkpoints.configs import Recipe
from russet.checkpoints.draft import SPARE_TENSORS, Draft
from russet.checkpoints.files import Weights, open_weights
from russet.checkpoints.ldm_keys import Part
from russet.checkpoints.load import Loaded, check_overrides
from russet.checkpoints.locate_file import locate_file
from russet.checkpoints.options import Options, Precision, precision_of
from russet.checkpoints.recipes import Request, choose_recipe
from russet.checkpoints.stored import StoredTensor
from russet.errors import CheckpointError, ConfigError, KeyMismatch

log = logging.getLogger(__name__)


def single_file(
    source: str | os.PathLike[str],
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: Precision = None,
    options: Options | None = None,
    **how: Any,
) -> Loaded:
    """Loads a pipeline out of one file, on the CPU. A safety checker is only there if the caller brings one.

    Args:
        source: a file, an address on the Hub ("https://huggingface.co/owner/name/blob/main/file.safetensors"), or
            "owner/name/file.safetensors".
        overrides: components to use instead of the file's own, or that the file lacks; None leaves one out.
        dtype: as for ``load.pipeline``.
        options: how to reach the Hub.
        how: the fields of ``Request``.

    Raises:
        InputError: an argument has a wrong value.
        CheckpointError: the file is missing, damaged, unsafe, of a kind that cannot be loaded, or does not fit.
        ConfigError: a config cannot be built.
    """
    overrides, options, request = dict(overrides or {}), options or Options(), Request(**how)
    check_overrides(overrides, COMPONENTS)
    path = locate_file(source, options)
    weights = open_weights(path)
    kind = checkpoint_kind(weights)
    recipe = choose_recipe(kind, weights, path, request, overrides, options)
    started = time.perf_counter()
    drafts = {
        part.component: draft(part, weights, recipe, ema=request.ema)
        for part in ldm_keys.LAYOUTS[kind.family]
        if part.component not in overrides
    }
    if strangers := ldm_keys.strangers(weights.tensors):
        log.warning("%s: %d tensors not used, such as %s", path, len(strangers), strangers[0][:200])
    others = {
        name: make_other(name, recipe, path) for name in recipe.parts if name not in {*ldm_keys.CLASSES, *overrides}
    }
    made = {name: draft.make(precision_of(dtype, name)) for name, draft in drafts.items()}
    log.info("%s: loaded a %s in %.2f s", path, kind, time.perf_counter() - started)
    components = {**dict.fromkeys(recipe.parts), **made, **others, **overrides}
    index = {"_class_name": recipe.class_name, **recipe.settings, "requires_safety_checker": False}
    return Loaded(recipe.class_name, components, index, os.fspath(source))


def checkpoint_kind(weights: Weights) -> kinds.Kind:
    """What the file is, if it is a model, or a UNet, in the layout of LDM.

    Raises:
        CheckpointError: it is something else; the error says what.
    """
    kind = kinds.recognise({name: tensor.shape for name, tensor in weights.tensors.items()})
    if kind.form in ("checkpoint", "unet") and kind.layout == "LDM" and kind.family and not kind.detail:
        return kind
    hint = {
        "lora": "load it into a pipeline with load_lora_weights",
        "embedding": "load it into a pipeline with load_textual_inversion",
        "vae": "load it with AutoencoderKL.from_single_file, and pass it to the pipeline as vae=",
        "unet": "put it into a folder beside its config.json as diffusion_pytorch_model.safetensors",
    }.get(kind.form, "from_single_file loads whole models in the layout of Stable Diffusion 1, 2 and XL")
    raise CheckpointError(f"{weights.where} is not a model that can be loaded by itself: {kind}; {hint}")


def draft(part: Part, weights: Weights, recipe: Recipe, *, ema: bool = False) -> Draft:
    """One network of the file, built and compared with its tensors, none of which is read yet.

    Raises:
        CheckpointError: the file does not have it.
        KeyMismatch: its tensors do not fit the config.
        ConfigError: the config cannot be built, or there is none.
    """
    where = f"{weights.where} ({part.component})"
    if (config := recipe.parts.get(part.component)) is None:
        raise ConfigError(f"{where}: there is no config for it; pass it in config=, or pass {part.component}=")
    prefix = next((p for p in part.prefixes if any(name.startswith(p) for name in weights.tensors)), None)
    if prefix is None:
        raise CheckpointError(f"{weights.where} has no {part.component}; pass one as {part.component}=")
    target = find(ldm_keys.CLASSES[part.component], where).load()
    parsed = target.config_class.from_dict(config, where)
    model = fill.build(target, parsed, limit=len(weights.tensors) + SPARE_TENSORS)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    sources = cut(part, prefix, weights, shapes, parsed, ema=ema and part.component == "unet")
    try:
        fill.check(model, {name: source.shape for name, source in sources.items()}, where)
    except KeyMismatch as error:
        raise KeyMismatch(f"{error} Configs other than the bundled ones are given as config=") from None
    return Draft(model, where, None, sources)


def cut(
    part: Part,
    prefix: str,
    weights: Weights,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    *,
    ema: bool,
) -> dict[str, StoredTensor]:
    """Our tensors of one network as parts of the file's, in the order of the file; the file's other tensors of this
    network, if they are not known to be spare, under the names that they have there.
    """
    places = ldm_keys.places(shapes, part.translate, config)
    keys = {name: ldm_keys.ema_key(place.key) if ema else prefix + place.key for name, place in places.items()}
    if ema and not any(key in weights.tensors for key in keys.values()):
        raise CheckpointError(f"{weights.where} has no averaged (EMA) weights; leave out ema=True")
    found = {
        name: place.cut(weights.tensors[keys[name]], shapes[name])
        for name, place in places.items()
        if keys[name] in weights.tensors
    }
    if not ema:
        known, spare = set(keys.values()), tuple(prefix + block for block in part.spare_blocks(config))
        found |= {
            key: tensor
            for key, tensor in weights.tensors.items()
            if key.startswith(prefix) and not (key in known or ldm_keys.ignored(key) or key.startswith(spare))
        }
    return dict(sorted(found.items(), key=lambda item: item[1].offset))


def make_other(name: str, recipe: Recipe, path: Path) -> Any:
    """A component without weights: a tokenizer or a scheduler; None where the model does without.

    Raises:
        ConfigError: the config is of no such component.
        CheckpointError: the text encoder has a vocabulary that is not bundled.
    """
    config = recipe.parts[name]
    if config is None:
        return None
    if name.startswith("tokenizer"):
        return tokenizer(name, recipe, path)
    class_name = config.get("_class_name")
    entry = find(class_name, f"{path}, {name}") if isinstance(class_name, str) else None
    if entry is None or entry.kind != "scheduler":
        raise ConfigError(f"{path}: a config for {name} must name its class as _class_name, not {class_name!r}")
    return entry.load().from_config(config)


def tokenizer(name: str, recipe: Recipe, path: Path) -> Any:
    """The tokenizer of the folder that the configs came from, else the one of CLIP."""
    if recipe.folder is not None and (recipe.folder / name).is_dir():
        return find("CLIPTokenizer", name).load().from_files(recipe.folder / name)
    encoder = recipe.parts.get(name.replace("tokenizer", "text_encoder")) or {}
    if (words := encoder.get("vocab_size", configs.VOCABULARY_SIZE)) != configs.VOCABULARY_SIZE:
        raise CheckpointError(
            f"{path}: its text encoder knows {words} tokens and CLIP's tokenizer has {configs.VOCABULARY_SIZE}; "
            f"pass the right one as {name}="
        )
    return configs.clip_tokenizer(recipe.parts[name])
