"""What a checkpoint is, by its headers and configs: no weight is read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

from russet.checkpoints import folder
from russet.checkpoints.arguments import Options, locate
from russet.checkpoints.folder import CLASSES, ClassEntry
from russet.checkpoints.formats.tensor_source import TORCH_NAMES, StoredTensor
from russet.checkpoints.formats.weight_files import Weights, choose_weight_files, variants_of
from russet.checkpoints.inspect_report import EMA, CheckpointReport, LoraReport, PartReport
from russet.checkpoints.layouts import detection, ldm_keys, lora_names
from russet.checkpoints.layouts.detection import FileKind, recognise
from russet.checkpoints.layouts.ldm_read import pending_weights
from russet.checkpoints.layouts.lora_names import Shapes
from russet.checkpoints.single_file.recipes import SingleFile, SingleFileRequest, choose_recipe
from russet.errors import CheckpointError, ConfigError, InputError, MissingFile
from russet.file_io import read_json


def inspect(path: str | os.PathLike[str]) -> CheckpointReport:
    """Looks into a weight file, a pipeline's folder, a component's folder, or "mini".

    Raises:
        InputError: it names neither a file nor a folder on this machine.
        CheckpointError: it is missing, damaged or unsafe.
    """
    if isinstance(path, (str, os.PathLike)) and (file := Path(path).expanduser()).is_file():
        return inspect_file(SingleFile.at(file))
    place = locate(path)
    if isinstance(place, str):
        raise InputError(f"{place} is on the Hub; download it first, then inspect the folder")
    return inspect_pipeline(place) if (place / folder.INDEX).is_file() else inspect_component(place)


# ---------------------------------------------------------------------------------------------------------------- files


def inspect_file(file: SingleFile) -> CheckpointReport:
    """Looks into one weight file."""
    kind, tensors = file.kind, file.weights.tensors
    report = CheckpointReport(str(file.path), kind, file.path.stat().st_size, (), metadata=file.weights.metadata)
    if kind.form == "lora":
        parts = (part_report("lora", tensors.values()),)
        return dataclasses.replace(report, parts=parts, lora=lora_report(file.weights.shapes, kind))
    if kind.family and kind.form in ("checkpoint", "unet") and kind.layout == "LDM":
        return inspect_model(file, report)
    return dataclasses.replace(report, parts=(part_report(kind.form, tensors.values()),))


def inspect_model(file: SingleFile, report: CheckpointReport) -> CheckpointReport:
    """Looks into a model in the layout of LDM or SGM, and tries whether the bundled configs fit its tensors."""
    tensors = file.weights.tensors
    groups = {
        part.component: [tensor for key, tensor in tensors.items() if key.startswith(part.prefixes)]
        for part in ldm_keys.LAYOUTS[file.kind.family]
    }
    groups[EMA] = [tensor for key, tensor in tensors.items() if key.startswith(ldm_keys.EMA + "diffusion_model")]
    prediction = file.prediction(SingleFileRequest())
    report = dataclasses.replace(
        report,
        parts=tuple(part_report(part, found) for part, found in groups.items() if found),
        predicts=f"{prediction.meaning or 'epsilon or v_prediction'}: {prediction.why}",
        unused=tuple(ldm_keys.unknown_keys(tensors)),
    )
    try:
        if file.kind.detail:
            raise CheckpointError(f"Russet has no sampler for an {file.kind.detail}")
        recipe = choose_recipe(file, prediction, SingleFileRequest(), Options())
        for part in ldm_keys.LAYOUTS[file.kind.family]:
            if groups[part.component]:
                pending_weights(part, file.weights, recipe)
    except (CheckpointError, ConfigError) as error:
        return dataclasses.replace(report, obstacle=str(error))
    parts = {name: config for name, config in recipe.parts.items() if config}
    return dataclasses.replace(report, pipeline=recipe.class_name, model=file.model(prediction), configs=parts)


def lora_report(shapes: Shapes, kind: FileKind) -> LoraReport:
    """What a LoRA changes, compared with the layers of the model that it was made for."""
    from russet.checkpoints.layouts import lora_layers

    found, unclear = lora_names.changes(shapes)
    layers: dict[str, set[str]] = {}
    for change in found:
        layers.setdefault(change.network, set()).add(change.layer)
    unknown = (*unclear, *lora_layers.unknown_layers(found, kind.family)) if kind.family else None
    counts = {network: len(names) for network, names in layers.items()}
    return LoraReport(kind.detail, lora_names.ranks(found), counts, detection.FAMILIES.get(kind.family, ""), unknown)


# -------------------------------------------------------------------------------------------------------------- folders


def inspect_pipeline(place: Path) -> CheckpointReport:
    """Looks into a pipeline's folder."""
    index = folder.read_index(place)
    parts, found, kind = [], {}, FileKind("checkpoint", layout="Diffusers")
    for name, class_name in index.parts.items():
        entry = CLASSES.get(class_name or "")
        if entry is None or entry.kind not in ("model", "scheduler"):
            continue
        found[name] = read_json(place / name / entry.config_file)
        if entry.kind == "model":
            weights, variants = folder_weights(place / name, entry)
            parts.append(part_report(name, weights.tensors.values(), variants))
            if name == "unet":
                detected = recognise(weights.shapes)
                kind = dataclasses.replace(kind, family=detected.family, task=detected.task)
    meaning = found.get("scheduler", {}).get("prediction_type", "epsilon")
    return CheckpointReport(
        str(place),
        kind,
        disk_size(place),
        tuple(parts),
        pipeline=index.class_name,
        configs=found,
        predicts=f"{meaning}: its scheduler's config says so" if "scheduler" in found else "",
    )


def inspect_component(place: Path) -> CheckpointReport:
    """Looks into the folder of one component."""
    config = place / "config.json"
    if not config.is_file():
        raise MissingFile(f"{place} has neither {folder.INDEX} nor config.json: it is no checkpoint in Diffusers form")
    data = read_json(config)
    architectures = data.get("architectures")
    names = [data.get("_class_name"), *(architectures if isinstance(architectures, list) else ())]
    entry = next((CLASSES[name] for name in names if isinstance(name, str) and name in CLASSES), None)
    if entry is None:
        raise InputError(f"{config} is not the config of a network that Russet has")
    weights, variants = folder_weights(place, entry)
    kind = recognise(weights.shapes)
    parts = (part_report(entry.name, weights.tensors.values(), variants),)
    return CheckpointReport(
        str(place), kind, disk_size(place), parts, configs={entry.name: data}, metadata=weights.metadata
    )


def folder_weights(place: Path, entry: ClassEntry) -> tuple[Weights, tuple[str, ...]]:
    """A component's weights, those of a variant if there are no others, and all its variants."""
    names = {path.name for path in place.iterdir()} if place.is_dir() else set()
    variants = tuple(sorted(variants_of(names, entry.stems)))
    try:
        files = choose_weight_files(names, entry.stems, None, None, str(place))
    except MissingFile:
        files = choose_weight_files(names, entry.stems, variants[0] if variants else None, None, str(place))
    return files.open(place), variants


def disk_size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------------- parts


def part_report(name: str, tensors: Iterable[StoredTensor], variants: tuple[str, ...] = ()) -> PartReport:
    """Adds up a network's tensors."""
    counts: dict[str, int] = {}
    nbytes = 0
    for tensor in tensors:
        nbytes += tensor.nbytes
        if tensor.dtype.startswith(("F", "BF")):  # counters are no parameters
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.count
    total = sum(counts.values())
    names = sorted(counts, key=lambda dtype: -counts[dtype])
    shares = [f"{TORCH_NAMES[dtype]} ({100 * counts[dtype] / max(total, 1):.0f} %)" for dtype in names]
    precision = TORCH_NAMES[names[0]] if len(names) == 1 else ", ".join(shares)
    return PartReport(name, total, precision, nbytes, variants)


__all__ = ["CheckpointReport", "LoraReport", "PartReport", "inspect"]
