"""What is reported about a checkpoint: plain data, and the same as lines of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from russet.checkpoints.layouts.detection import FileKind

EMA = "unet (averaged)"
SHOWN = 5  # names listed of many
SHOWN_METADATA = {  # metadata of interest to a person, and its label
    "modelspec.title": "title",
    "modelspec.author": "author",
    "modelspec.license": "license",
    "modelspec.date": "date",
    "modelspec.trigger_phrase": "trigger phrase",
    "ss_output_name": "title",
    "ss_base_model_version": "made for",
    "ss_sd_model_name": "made from",
    "ss_network_alpha": "alpha",
}


@dataclasses.dataclass(frozen=True)
class PartReport:
    """One network: how many parameters, in which precision, in how many bytes; ``variants``: the other files of it."""

    name: str
    parameters: int
    precision: str
    nbytes: int
    variants: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LoraReport:
    """What a LoRA changes. ``layers``: network → how many of its layers. ``unknown``: tensors and layers that are not
    of the model it was made for; empty where every key is understood, None where that model is not known.
    """

    method: str
    ranks: tuple[int, ...]
    layers: Mapping[str, int]
    base: str
    unknown: tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """What a file or folder is. ``print(report)`` reads as text.

    ``size``: bytes on disk. ``pipeline``: the class that loads it, "" where none does; ``obstacle`` says why then.
    ``model``: the bundled configs that a single file loads with. ``configs``: component → JSON data. ``predicts``: what
    the model's output means, and how that is known. ``unused``: tensors of no network that may have been needed.
    """

    path: str
    kind: FileKind
    size: int
    parts: tuple[PartReport, ...]
    pipeline: str = ""
    model: str = ""
    obstacle: str = ""
    configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, repr=False)
    predicts: str = ""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    unused: tuple[str, ...] = ()
    lora: LoraReport | None = None

    @property
    def parameters(self) -> int:
        """Of all networks; the averaged copy of one is not counted again."""
        return sum(part.parameters for part in self.parts if part.name != EMA)

    @property
    def has_ema(self) -> bool:
        """Whether there is an averaged copy of the UNet."""
        return any(part.name == EMA for part in self.parts)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Label and text of each thing that there is to say, each on one line and safe to print."""
        return ((label, printable(text)) for label, text in self._rows())

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "what", str(self.kind)
        yield "size", f"{spelled_bytes(self.size)}, {spelled_count(self.parameters)} parameters"
        for part in self.parts:
            variants = f"; variants {', '.join(part.variants)}" if part.variants else ""
            yield part.name, f"{spelled_count(part.parameters)} parameters, {part.precision}{variants}"
        if self.pipeline:
            yield "loads as", f"{self.pipeline}, as {self.model}" if self.model else self.pipeline
        if self.obstacle:
            yield "does not load", self.obstacle
        if self.predicts:
            yield "predicts", self.predicts
        if self.lora:
            yield from lora_rows(self.lora)
        if self.unused:
            yield "not used", listed(self.unused)
        for key, label in SHOWN_METADATA.items():
            if text := self.metadata.get(key):
                yield label, text if len(text) <= 200 else f"{text[:200]}…"

    def __str__(self) -> str:
        return "\n".join([printable(self.path), *(f"  {label + ':':<22}{text}" for label, text in self.rows())])


def lora_rows(lora: LoraReport) -> Iterator[tuple[str, str]]:
    yield "rank", ", ".join(map(str, lora.ranks)) or "unknown"
    yield "changes", ", ".join(f"{count} layers of {network}" for network, count in lora.layers.items())
    if lora.unknown is None:
        yield "base", "cannot be told from its tensors"
    else:
        yield "base", lora.base
        yield "keys", f"unknown: {listed(lora.unknown)}" if lora.unknown else "all understood"


def listed(names: tuple[str, ...]) -> str:
    more = f", … ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return ", ".join(name[:100] for name in names[:SHOWN]) + more


def printable(text: str) -> str:
    """Text from a file without the characters that control a terminal."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def spelled_bytes(count: int) -> str:
    """Bytes as a person says them: "2.13 GB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count} bytes"


def spelled_count(count: int) -> str:
    """A number of parameters as a person says it: "860 million"."""
    return (
        f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count}"
    )
