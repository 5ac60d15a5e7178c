"""Single files: a whole model in one .safetensors or .ckpt, with the tensor names of its authors' code (LDM, SGM).

``detection`` recognises the file by its tensors; ``ldm_keys`` says where each of a model's tensors lies; the configs,
which no tensor can say, are bundled (``configs``). As with folders, everything is checked before the first weight is
read.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from russet.checkpoints import configs
from russet.checkpoints.arguments import Options, Precision, precision_of
from russet.checkpoints.configs import Recipe
from russet.checkpoints.folder import COMPONENTS, find_class
from russet.checkpoints.formats import tensor_source
from russet.checkpoints.layouts import ldm_keys, old_checkpoints
from russet.checkpoints.layouts.ldm_read import pending_weights
from russet.checkpoints.load import Loaded, check_overrides
from russet.checkpoints.single_file.locate import locate_file
from russet.checkpoints.single_file.prediction import Prediction, probe_prediction
from russet.checkpoints.single_file.recipes import SingleFile, SingleFileRequest, choose_recipe, needs_probe
from russet.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)


def single_file(
    source: str | os.PathLike[str],
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: Precision = None,
    options: Options | None = None,
    accepts: Callable[[str], Collection[str]] | None = None,
    postponed: bool = False,
    **how: Any,
) -> Loaded:
    """Loads a pipeline out of one file, on the CPU. A safety checker is only there if the caller brings one.

    Args:
        source: a file, an address on the Hub ("https://huggingface.co/owner/name/blob/main/file.safetensors"), or
            "owner/name/file.safetensors".
        overrides: components to use instead of the file's own, or that the file lacks; None leaves one out.
        dtype: as for ``load.pipeline``.
        options: how to reach the Hub.
        accepts: given the name of the pipeline that the file is for, the components that the caller takes; it may
            raise. None takes all. It is called before any weight is read.
        postponed: as for ``load.pipeline``; a UNet that has to be probed for what it predicts is read all the same.
        how: the fields of ``SingleFileRequest``.

    Raises:
        InputError: an argument has a wrong value.
        CheckpointError: the file is missing, damaged, unsafe, of a kind that cannot be loaded, or does not fit.
        ConfigError: a config cannot be built.
    """
    overrides, options, request = dict(overrides or {}), options or Options(), SingleFileRequest(**how)
    check_overrides(overrides, COMPONENTS)
    file = SingleFile.at(locate_file(source, options))
    check_kind(file)
    prediction = file.prediction(request, overrides.get("scheduler"))
    recipe = choose_recipe(file, prediction, request, options)
    parts = [part for part in ldm_keys.LAYOUTS[file.kind.family] if part.component not in overrides]
    taken = accepts(recipe.class_name) if accepts else COMPONENTS
    if foreign := [part.component for part in parts if part.component not in taken]:
        raise CheckpointError(
            f"{file.path} is a {file.kind} with {', '.join(foreign)}; load it with {recipe.class_name}"
        )
    started = time.perf_counter()
    pending = {
        part.component: pending_weights(
            part, file.weights, recipe, averaged=request.extract_ema, dtype=precision_of(dtype, part.component)
        )
        for part in parts
    }
    if unknown := ldm_keys.unknown_keys(file.weights.tensors):
        log.warning("%s: %d tensors not used, such as %s", file.path, len(unknown), unknown[0][:200])
    wanted = [name for name in SMALL if name in recipe.parts and name not in overrides]
    small = {name: make_small(name, recipe, file.path) for name in wanted}
    probed = {"unet"} & pending.keys() if needs_probe(prediction, request) else set()
    now = probed if postponed and tensor_source.KEEP_OPEN else pending.keys()
    made = {
        name: weights.make(precision_of(dtype, name)) if name in now else weights.component
        for name, weights in pending.items()
    }
    if probed:
        recipe = probed_recipe(file, prediction, request, options, made)
        small["scheduler"] = make_small("scheduler", recipe, file.path)
    done = "loaded" if now == pending.keys() else "opened"
    log.info("%s: %s a %s in %.2f s", file.path, done, file.kind, time.perf_counter() - started)
    components = {**dict.fromkeys(recipe.parts), **made, **small, **overrides}
    index = {"_class_name": recipe.class_name, **recipe.settings, "requires_safety_checker": False}
    readers = {made[name]: weights for name, weights in pending.items()}
    return Loaded(recipe.class_name, components, index, os.fspath(source), readers)


def check_kind(file: SingleFile) -> None:
    """Raises CheckpointError unless the file is a model, or a UNet, in the layout of LDM; the error says what it is."""
    kind = file.kind
    if kind.form in ("checkpoint", "unet") and kind.layout == "LDM" and kind.family and not kind.detail:
        return
    hint = {
        "vae": "load it with AutoencoderKL.from_single_file, and pass it to a pipeline as vae=",
        "unet": "load it with UNet2DConditionModel.from_single_file, and pass it to a pipeline as unet=",
        "lora": "it changes another model, which must be loaded first",
        "embedding": "it adds words to another model, which must be loaded first",
    }.get(kind.form, "a file with the tensors of Stable Diffusion 1, 2 or XL is needed")
    raise CheckpointError(f"{file.path} is not a model that can be loaded by itself, but: {kind}; {hint}")


def probed_recipe(
    file: SingleFile, prediction: Prediction, request: SingleFileRequest, options: Options, made: Mapping[str, Any]
) -> Recipe:
    """The recipe of a model about which nothing says what it predicts: its UNet, loaded by now, is probed."""
    meaning = probe_prediction(made["unet"])
    log.warning(
        "%s: %s whether this model predicts noise or velocity; taking %s, as %s. If pictures come out as noise, load "
        "it with prediction_type='epsilon' or 'v_prediction', which ends this warning too",
        file.path,
        prediction.why,
        meaning or "v_prediction",
        "a trial of its UNet shows" if meaning else "most such models have it (a trial of its UNet shows neither)",
    )
    recipe = choose_recipe(file, dataclasses.replace(prediction, meaning=meaning or "v_prediction"), request, options)
    # Both kinds of Stable Diffusion 2 are the same networks; their configs differ in the size of pictures and the like.
    for name, network in made.items():
        network.config = type(network.config).from_dict(recipe.parts[name] or {})
    return recipe


SMALL = ("tokenizer", "tokenizer_2", "scheduler")


def make_small(name: str, recipe: Recipe, path: Path) -> Any:
    """A component without weights; None where the model does without.

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
    entry = find_class(class_name, f"{path}, {name}") if isinstance(class_name, str) else None
    if entry is None or entry.kind != "scheduler":
        raise ConfigError(f"{path}: a config for {name} must name its class as _class_name, not {class_name!r}")
    target = entry.load()
    parsed = target.config_class.from_dict(config, f"{path}, {name}")
    return target(old_checkpoints.repaired(parsed, f"{path}, {name}") if recipe.repair else parsed)


def tokenizer(name: str, recipe: Recipe, path: Path) -> Any:
    """The tokenizer of the folder that the configs came from, else the one of CLIP."""
    if recipe.folder is not None and (recipe.folder / name).is_dir():
        return find_class("CLIPTokenizer", name).load().from_files(recipe.folder / name)
    encoder = recipe.parts.get(name.replace("tokenizer", "text_encoder")) or {}
    if (words := encoder.get("vocab_size", configs.VOCABULARY_SIZE)) != configs.VOCABULARY_SIZE:
        raise CheckpointError(
            f"{path}: its text encoder knows {words} tokens and CLIP's tokenizer has {configs.VOCABULARY_SIZE}; "
            f"pass the right one as {name}="
        )
    return configs.clip_tokenizer(recipe.parts[name])
