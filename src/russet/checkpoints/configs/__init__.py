"""The published configs of the known models, so that a single file, which has weights alone, loads with no network.

models.json lists them: each has parts (a component → a config file beside it, null where the model lacks it), changes
to those configs, and settings of its pipeline; ``like`` names the model that it takes the rest from. CLIP's vocabulary
lies here too, as its authors publish it.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from russet.checkpoints.folder import read_index
from russet.checkpoints.layouts import old_checkpoints
from russet.errors import ConfigError
from russet.file_io import read_json

if TYPE_CHECKING:
    from russet.text.tokenizer import CLIPTokenizer

FOLDER = Path(__file__).parent
VOCABULARY = FOLDER / "tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SIZE = 49408
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
"""What single files hold, or need beside what they hold."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What it takes to build a pipeline around weights that come without configs.

    ``parts``: component → its config as JSON data; None where the model does without it. ``settings``: the pipeline's
    own values in model_index.json. ``folder``: where the configs came from, if tokenizers are to be read from there.
    """

    class_name: str
    parts: Mapping[str, Mapping[str, Any] | None]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = None

    @property
    def repair(self) -> bool:
        """Whether the configs may have the faults of old checkpoints."""
        return self.folder is not None and old_checkpoints.repairs_apply(self.class_name)

    def changed(self, component: str, **changes: Any) -> Recipe:
        """The same with other values in one component's config."""
        return self.replaced(component, {**(self.parts.get(component) or {}), **changes})

    def replaced(self, component: str, config: Mapping[str, Any] | None) -> Recipe:
        """The same with another config for one component."""
        return dataclasses.replace(self, parts={**self.parts, component: config})


@functools.cache
def models() -> Mapping[str, Mapping[str, Any]]:
    """The table of models.json."""
    return read_json(FOLDER / "models.json")


def bundled(name: str) -> Recipe:
    """The published configs of a model, by its name in models.json.

    Raises:
        ConfigError: no such model; the error lists those there are.
    """
    if name not in models():
        raise ConfigError(f"there are no bundled configs {name!r}; there are {', '.join(models())}")
    entry = resolved(name)
    parts = {
        part: {**read_json(FOLDER / file), **entry["changes"].get(part, {})} if file else None
        for part, file in entry["parts"].items()
    }
    return Recipe(entry["class"], parts, entry["settings"])


def resolved(name: str) -> dict[str, Any]:
    """An entry of models.json with what it takes from the one it is ``like``."""
    entry = models()[name]
    base = resolved(entry["like"]) if "like" in entry else {"parts": {}, "changes": {}, "settings": {}}
    merged = {key: {**base[key], **entry.get(key, {})} for key in ("parts", "changes", "settings")}
    return {**merged, "class": entry.get("class", base.get("class"))}


def from_folder(folder: Path) -> Recipe:
    """The configs of a checkpoint folder in Diffusers form; its weights, if it has any, are not looked at.

    Raises:
        CheckpointError: a config is not there or damaged.
        ConfigError: the folder names a class that Russet does not have.
    """
    index = read_index(folder)
    entries = index.entries(skipped=set(index.parts) - set(COMPONENTS))
    parts: dict[str, Mapping[str, Any] | None] = {
        name: read_json(folder / name / entry.config_file) if entry.kind != "tokenizer" else {}
        for name, entry in entries.items()
    }
    absent = {name: None for name in COMPONENTS if name in index.parts and name not in entries}
    settings = {key: value for key, value in index.raw.items() if key[0] != "_" and not isinstance(value, list)}
    return Recipe(index.class_name, parts | absent, settings, folder)


def clip_tokenizer(config: Mapping[str, Any] | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer from the bundled vocabulary; ``config`` is its tokenizer_config.json."""
    from russet.text.tokenizer import CLIPTokenizer, CLIPTokenizerConfig

    vocab, merges = clip_vocabulary()
    return CLIPTokenizer(vocab, merges, CLIPTokenizerConfig.from_dict(config or {}))


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary (token → id) and merges, derived from the published list of merges.

    The ids count the 256 bytes, the bytes at the end of a word, the results of the merges in their order, and the two
    special tokens, which the list leaves out. (github.com/openai/CLIP, simple_tokenizer.py)
    """
    text = gzip.decompress(VOCABULARY.read_bytes()).decode("utf-8")
    letters = byte_letters()
    count = VOCABULARY_SIZE - 2 * len(letters) - 2
    merges = [(first, second) for first, second in (line.split() for line in text.split("\n")[1 : count + 1])]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(first + second for first, second in merges)]
    return {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def byte_letters() -> list[str]:
    """A printable character for each byte, in the order of CLIP's ids: a byte that is a printable character of Latin-1
    stands for itself, the others count up from U+0100, after them.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return [chr(code) for code in [*printable, *range(0x100, 0x100 + others)]]
