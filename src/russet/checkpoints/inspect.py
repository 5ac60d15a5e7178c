"""What a checkpoint is, told from its headers and configs: no weight is read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from russet.checkpoints import configs, folder, kinds, ldm_keys, lora_names, prediction, recipes, weight_names
from russet.checkpoints.classes import TABLE, Entry
from russet.checkpoints.files import Weights, open_weights
from russet.checkpoints.kinds import Kind
from russet.checkpoints.locate import locate
from russet.checkpoints.lora_names import Shapes
from russet.checkpoints.stored import TORCH_NAMES, StoredTensor
from russet.errors import InputError, MissingFile
from russet.smallfiles import read_json


@dataclasses.dataclass(frozen=True)
class PartReport:
    """One network: how many parameters, in which precision, in how many bytes."""

    name: str
    parameters: int
    precision: str
    nbytes: int
    variants: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LoraReport:
    """What a LoRA changes. ``layers``: network → how many of its layers. ``unknown``: tensors and layers that are not
    of the model it was made for; empty means that every key is understood; None that the model is not known.
    """

    method: str
    ranks: tuple[int, ...]
    layers: Mapping[str, int]
    base: str
    unknown: tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What a file or folder is.

    ``size``: bytes on disk. ``model``: the bundled configs that it loads with, "" where it does not load by itself.
    ``configs``: component → JSON data. ``predicts``: what the model's output means, and how that is known.
    ``unused``: tensors that belong to no network and are not known to be spare.
    """

    path: str
    kind: Kind
    size: int
    parts: tuple[PartReport, ...]
    model: str = ""
    configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    predicts: str = ""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    lora: LoraReport | None = None

    @property
    def parameters(self) -> int:
        """Of all parts that make pictures: averaged copies are not counted twice."""
        return sum(part.parameters for part in self.parts if part.name != EMA)

    @property
    def has_ema(self) -> bool:
        """Whether there is an averaged copy of the UNet."""
        return any(part.name == EMA for part in self.parts)


EMA = "unet (averaged)"


def inspect(path: str | os.PathLike[str]) -> Report:
    """Looks into a weight file, a pipeline's folder, a component's folder, or "mini".

    Raises:
        InputError: it names neither a file nor a folder on this machine.
        CheckpointError: it is missing, damaged or unsafe.
    """
    if isinstance(path, (str, os.PathLike)) and Path(path).expanduser().is_file():
        return inspect_file(open_weights(Path(path).expanduser()), Path(path).expanduser())
    place = locate(path)
    if isinstance(place, str):
        raise InputError(f"{place} is on the Hub; download it first, then inspect the folder")
    return inspect_pipeline(place) if (place / folder.INDEX).is_file() else inspect_component(place)


# ---------------------------------------------------------------------------------------------------------------- files


def inspect_file(weights: Weights, path: Path) -> Report:
    """Looks into one weight file."""
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    kind = kinds.recognise(shapes)
    report = Report(str(path), kind, path.stat().st_size, (), metadata=weights.metadata)
    if kind.form == "lora":
        parts = (part_report("lora", weights.tensors.values()),)
        return dataclasses.replace(report, parts=parts, lora=lora_report(shapes, kind))
    if kind.family and kind.form in ("checkpoint", "unet") and kind.layout == "LDM":
        return inspect_checkpoint(report, weights, path)
    return dataclasses.replace(report, parts=(part_report(kind.form, weights.tensors.values()),))


def inspect_checkpoint(report: Report, weights: Weights, path: Path) -> Report:
    """Looks into a model in the layout of LDM or SGM."""
    beside = recipes.sidecar(path, recipes.Request())
    told = prediction.decide(
        report.kind, sidecar=beside, names=weights.tensors, metadata=weights.metadata, stem=path.stem
    )
    name = recipes.model_name(report.kind, told, weights.metadata, path.stem)
    loads = name in configs.models() and not report.kind.detail
    recipe = recipes.adapted(configs.bundled(name), told) if loads else None
    groups = {
        part.component: [tensor for key, tensor in weights.tensors.items() if key.startswith(part.prefixes)]
        for part in ldm_keys.LAYOUTS[report.kind.family]
    }
    groups[EMA] = [
        tensor for key, tensor in weights.tensors.items() if key.startswith(ldm_keys.EMA + "diffusion_model")
    ]
    return dataclasses.replace(
        report,
        parts=tuple(part_report(part, tensors) for part, tensors in groups.items() if tensors),
        model=name if loads else "",
        configs={part: config for part, config in recipe.parts.items() if config} if recipe else {},
        predicts=f"{told.meaning or 'epsilon or v_prediction'}: {told.why}",
        unused=tuple(ldm_keys.strangers(weights.tensors)),
    )


def lora_report(shapes: Shapes, kind: Kind) -> LoraReport:
    """What a LoRA changes, compared with the layers of the model that it was made for."""
    from russet.checkpoints import lora_layers

    found, odd = lora_names.changes(shapes)
    layers: dict[str, set[str]] = {}
    for change in found:
        layers.setdefault(change.network, set()).add(change.layer)
    unknown = (*odd, *lora_layers.strangers(found, kind.family)) if kind.family else None
    counts = {network: len(names) for network, names in layers.items()}
    return LoraReport(kind.detail, lora_names.ranks(found), counts, kinds.FAMILIES.get(kind.family, ""), unknown)


# -------------------------------------------------------------------------------------------------------------- folders


def inspect_pipeline(place: Path) -> Report:
    """Looks into a pipeline's folder."""
    index = folder.read_index(place)
    parts, found, kind = [], {}, Kind("checkpoint", layout="Diffusers")
    for name, class_name in index.parts.items():
        entry = TABLE.get(class_name or "")
        if entry is None or entry.kind not in ("model", "scheduler"):
            continue
        found[name] = read_json(place / name / entry.config_file)
        if entry.kind == "model":
            weights, variants = folder_weights(place / name, entry)
            parts.append(part_report(name, weights.tensors.values(), variants))
        if name == "unet":
            told = kinds.recognise({key: tensor.shape for key, tensor in weights.tensors.items()})
            kind = dataclasses.replace(kind, family=told.family, task=told.task)
    meaning = found.get("scheduler", {}).get("prediction_type", "epsilon")
    predicts = f"{meaning}: its scheduler's config says so" if "scheduler" in found else ""
    return Report(str(place), kind, disk_size(place), tuple(parts), index.class_name, found, predicts)


def inspect_component(place: Path) -> Report:
    """Looks into the folder of one component."""
    config = place / "config.json"
    if not config.is_file():
        raise MissingFile(f"{place} has neither {folder.INDEX} nor config.json: it is no checkpoint in Diffusers form")
    data = read_json(config)
    names = [data.get("_class_name"), *(data.get("architectures") or ())]
    entry = next((TABLE[name] for name in names if isinstance(name, str) and name in TABLE), None)
    if entry is None:
        raise InputError(f"{config} is not the config of a network that Russet has")
    weights, variants = folder_weights(place, entry)
    kind = kinds.recognise({key: tensor.shape for key, tensor in weights.tensors.items()})
    parts = (part_report(entry.name, weights.tensors.values(), variants),)
    return Report(str(place), kind, disk_size(place), parts, configs={entry.name: data}, metadata=weights.metadata)


def folder_weights(place: Path, entry: Entry) -> tuple[Weights, tuple[str, ...]]:
    """A component's weights, those of a variant if there are no others, and all its variants."""
    names = {path.name for path in place.iterdir()} if place.is_dir() else set()
    variants = tuple(sorted(weight_names.variants(names, entry.stems)))
    plain = weight_names.choose(names, entry.stems, None, None)
    choice = plain or folder.find_weights(place, entry, variants[0] if variants else None, None)
    return folder.open_component(place, choice), variants


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
    shares = [f"{TORCH_NAMES[dtype]} ({100 * counts[dtype] / total:.0f} %)" for dtype in names]
    precision = TORCH_NAMES[names[0]] if len(names) == 1 else ", ".join(shares)
    return PartReport(name, total, precision, nbytes, variants)
