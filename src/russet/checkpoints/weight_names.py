"""Which of a component's files hold its weights: decided on the names alone, for a folder and for the Hub alike.

With stem S, extension E (safetensors or bin) and variant V, the names found in the wild are::

    S.E                         S.V.E                         one file
    S-00001-of-00002.E          S.V-00001-of-00002.E          shards; legacy: S-00001-of-00002.V.E
    S.E.index.json              S.E.index.V.json              their index; legacy: S.E.V.index.json
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

SHARD = re.compile(r"-\d{5}-of-\d{5}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The file to open first (the weights, or the index of their shards), and all files that this takes.

    ``variant`` is the one that they belong to, ``variants`` are all that the folder has files of.
    """

    first: str
    files: tuple[str, ...]
    variant: str | None
    variants: frozenset[str] = frozenset()

    @property
    def sharded(self) -> bool:
        """Whether ``first`` is an index."""
        return self.first.endswith(".json")


def choose(
    names: Collection[str], stems: Mapping[str, str], variant: str | None, use_safetensors: bool | None
) -> Choice | None:
    """The files to read, or None where there are none.

    The variant comes before the plain files, safetensors before pickles (``use_safetensors`` allows only one of the
    two), one file before shards.
    """
    extensions = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]
    for wanted in dict.fromkeys((variant, None)):
        for extension in extensions:
            if choice := _choose(names, stems[extension], extension, wanted):
                return dataclasses.replace(choice, variants=variants(names, stems))
    return None


def _choose(names: Collection[str], stem: str, extension: str, variant: str | None) -> Choice | None:
    single = ".".join(part for part in (stem, variant, extension) if part)
    if single in names:
        return Choice(single, (single,), variant)
    full = f"{stem}.{extension}"
    indexes = [f"{full}.index.{variant}.json", f"{full}.{variant}.index.json"] if variant else [f"{full}.index.json"]
    index = next((name for name in indexes if name in names), None)
    if index is None:
        return None
    shards = sorted(name for name in names if SHARD.search(name) and SHARD.sub("", name) == single)
    return Choice(index, (index, *shards), variant)


def variants(names: Collection[str], stems: Mapping[str, str]) -> frozenset[str]:
    """The variants that there are files of."""
    found: set[str] = set()
    for extension, stem in stems.items():
        pattern = re.compile(rf"{re.escape(stem)}\.(\w+)\.{extension}")
        found |= {match[1] for name in names if (match := pattern.fullmatch(SHARD.sub("", name)))}
    return frozenset(found)


def belongs(name: str, stems: Mapping[str, str], variant: str | None) -> bool:
    """Whether a file is weights, a shard or an index of this variant, of whatever format."""
    for extension, stem in stems.items():
        full = f"{stem}.{extension}"
        indexes = (
            (f"{full}.index.{variant}.json", f"{full}.{variant}.index.json") if variant else (f"{full}.index.json",)
        )
        single = ".".join(part for part in (stem, variant, extension) if part)
        if name in indexes or SHARD.sub("", name) == single:
            return True
    return False
