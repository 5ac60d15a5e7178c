"""One network out of a single file: a VAE or UNet that came by itself, or one that is a part of a whole model."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from russet.checkpoints import configs
from russet.checkpoints.arguments import Options, precision_of, read_dtype
from russet.checkpoints.configs import Recipe
from russet.checkpoints.folder import entry_of
from russet.checkpoints.layouts import ldm_keys
from russet.checkpoints.layouts.ldm_keys import LdmNetwork
from russet.checkpoints.layouts.ldm_read import pending_weights
from russet.checkpoints.single_file.locate import locate_file
from russet.checkpoints.single_file.recipes import SingleFile, SingleFileRequest, named_recipe
from russet.errors import CheckpointError, InputError

log = logging.getLogger(__name__)

T = TypeVar("T")


def component(
    cls: type[T],
    source: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    torch_dtype: torch.dtype | str | None = None,
    dtype: torch.dtype | str | None = None,
    extract_ema: bool = False,
    **options: Any,
) -> T:
    """Loads one network out of a single file, on the CPU.

    Args:
        cls: its class, for example ``AutoencoderKL``.
        source: as for ``single_file``; the file may hold this network alone or a whole model.
        config: the network's config as a dict, or whatever ``single_file`` takes. Left out, the published one of the
            model that the tensors belong to. A VAE's tensors do not tell Stable Diffusion from XL, whose latents have
            another scale: a file with "xl" in its name is taken for XL's.
        torch_dtype, dtype: of the weights; None is float32.
        extract_ema: take the averaged UNet, where the file has both.
        options: the fields of ``Options``.

    Raises:
        InputError: an argument has a wrong value, or ``cls`` is not in single files.
        CheckpointError: the file is missing, damaged, unsafe, does not have the network, or does not fit its config.
        ConfigError: the config cannot be built.
    """
    name = component_name(cls)
    wanted = Options.of(options)
    precision = read_dtype(torch_dtype=torch_dtype, dtype=dtype)
    file = SingleFile.at(locate_file(source, wanted))
    recipe = component_recipe(name, config, file, wanted)
    made: T = pending_weights(part_of(name, file), file.weights, recipe, averaged=extract_ema).make(
        precision_of(precision, "")
    )
    return made


def component_name(cls: type[Any]) -> str:
    """The component that a class is in single files."""
    entry = entry_of(cls)
    name = next((name for name, class_name in ldm_keys.CLASSES.items() if class_name == entry.name), None)
    if name is None:
        raise InputError(f"single files hold no {cls.__name__}; they hold {', '.join(ldm_keys.CLASSES.values())}")
    return name


def part_of(name: str, file: SingleFile) -> LdmNetwork:
    """Where the network lies in the file.

    Raises:
        CheckpointError: it is not in files of this kind.
    """
    part = next((part for part in ldm_keys.LAYOUTS[file.kind.family or "sd1"] if part.component == name), None)
    alone = file.kind.form == name
    if part is None or not (alone or file.kind.form == "checkpoint"):
        raise CheckpointError(f"{file.path} has no {name}: it is a {file.kind}")
    if not alone:
        return part
    prefixes = (*part.prefixes, "") if file.kind.layout == "LDM" else ()
    return dataclasses.replace(part, prefixes=prefixes)


def component_recipe(
    name: str, config: str | os.PathLike[str] | Mapping[str, Any] | None, file: SingleFile, options: Options
) -> Recipe:
    """The configs for one network: the caller's, else the published ones."""
    if isinstance(config, Mapping):
        return Recipe("", {name: config})
    if config is not None:
        return named_recipe(config, options)
    model = file.model(file.prediction(SingleFileRequest()))
    if name == "vae" and not file.kind.family:
        model = "sdxl" if "xl" in file.path.stem.lower() else "sd1"
        log.info("%s: taken for the VAE of %s by its name; config= says otherwise", file.path, model)
    if model not in configs.models():
        raise CheckpointError(f"{file.path} is a {file.kind}, for which there is no config here; pass config=")
    return configs.bundled(model)
