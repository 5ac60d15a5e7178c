"""The files of a tokenizer folder, read to plain data and written from it.

Three generations are found in the wild: vocab.json and merges.txt beside tokenizer_config.json and
special_tokens_map.json; the same with ``added_tokens_decoder`` in tokenizer_config.json; and tokenizer.json, which
holds vocabulary and merges, beside tokenizer_config.json alone, as transformers 5 saves them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from russet.errors import CorruptFile, MissingFile
from russet.file_io import read_json, read_text, write_json, write_text

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
UNLIMITED = 1_000_000
"""A ``model_max_length`` above this is how transformers writes "not known"."""


class Files(NamedTuple):
    """What a tokenizer folder says.

    config: tokenizer_config.json, its special tokens with their matching rules where any file gives them.
    added: tokens behind the vocabulary → id.
    """

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    config: dict[str, Any]
    added: dict[str, int]


def read(folder: Path) -> Files:
    """Reads a tokenizer folder; only the vocabulary and the merges must be there.

    Raises:
        MissingFile: there is no vocabulary.
        CorruptFile: a file does not hold what its name says.
    """
    whole = optional_json(folder / "tokenizer.json")
    if whole and not (folder / "vocab.json").is_file():
        model = whole["model"] if isinstance(whole.get("model"), dict) else {}
        vocab = vocabulary(model.get("vocab"), folder / "tokenizer.json")
        merges = pairs(model.get("merges"), folder / "tokenizer.json")
    else:
        vocab = vocabulary(read_json(folder / "vocab.json"), folder / "vocab.json")
        lines = [line for line in read_text(folder / "merges.txt").splitlines() if line.strip()]
        merges = pairs([line for line in lines if not line.startswith("#version")], folder / "merges.txt")
    config = optional_json(folder / "tokenizer_config.json")
    declared = declared_tokens(folder, config, whole)
    # As transformers: special_tokens_map.json is the older file, and wins where the newer form is absent.
    if config.pop("added_tokens_decoder", None) is None:
        special = optional_json(folder / "special_tokens_map.json")
        config.update({role: special[role] for role in ROLES if role in special})
    for role in ROLES:
        if isinstance(token := config.get(role), str):
            config[role] = declared.get(token, {}).get("rules", token)
        elif token is None:
            config.pop(role, None)
    limit = config.get("model_max_length")
    if limit is None or (isinstance(limit, (int, float)) and limit > UNLIMITED):
        config.pop("model_max_length", None)
    added = {text: token["id"] for text, token in declared.items() if text not in vocab}
    return Files(vocab, merges, config, added)


def write(folder: Path, files: Files) -> None:
    """Writes the files that ``read`` and every transformers read.

    Raises:
        CheckpointError: a file cannot be written.
    """
    write_text(folder / "vocab.json", json.dumps(files.vocab, ensure_ascii=False, separators=(",", ":")))
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in files.merges))
    texts = {role: content(files.config[role]) for role in ROLES}
    write_json(folder / "tokenizer_config.json", {**files.config, **texts, "tokenizer_class": "CLIPTokenizer"})
    write_json(folder / "special_tokens_map.json", {role: files.config[role] for role in ROLES})
    if files.added:
        write_json(folder / "added_tokens.json", files.added)


def content(token: Any, key: str = "content") -> Any:
    """A special token's text, in either of its JSON forms: the text itself, or an object that holds it."""
    return token.get(key) if isinstance(token, Mapping) else token


def declared_tokens(folder: Path, config: dict[str, Any], whole: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Whole tokens that the folder names outside the vocabulary: text → {"id": int, "rules"?: JSON object}."""
    found: dict[Any, dict[str, Any]] = {}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        listed = [(token, int(number) if number.isdecimal() else number) for number, token in decoder.items()]
    else:
        found = {text: {"id": number} for text, number in optional_json(folder / "added_tokens.json").items()}
        tokens = whole.get("added_tokens")
        listed = [(token, content(token, "id")) for token in tokens] if isinstance(tokens, list) else []
    for token, number in listed:
        if not isinstance(token, dict) or not isinstance(content(token), str):
            raise CorruptFile(f"{folder}: an added token must be an object with its content, not {token!r}")
        found[content(token)] = {"id": number, "rules": {key: value for key, value in token.items() if key != "id"}}
    for text, entry in found.items():
        if type(entry["id"]) is not int:
            raise CorruptFile(f"{folder}: the added token {text!r} must have a number, not {entry['id']!r}")
    return found


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where the file is absent."""
    try:
        return read_json(path)
    except MissingFile:
        return {}


def vocabulary(data: Any, path: Path) -> dict[str, int]:
    """Checks a vocabulary: an object of token → id, ids from 0 without a gap."""
    if not isinstance(data, dict) or not data or any(type(number) is not int for number in data.values()):
        raise CorruptFile(f"{path} holds no vocabulary: an object of token → id is needed")
    if sorted(data.values()) != list(range(len(data))):
        raise CorruptFile(f"{path}: the ids must count from 0 without a gap or a repetition")
    return data


def pairs(data: Any, path: Path) -> list[tuple[str, str]]:
    """Checks merges, each a pair of tokens: "a b", or in newer files ["a", "b"]."""
    if not isinstance(data, list):
        raise CorruptFile(f"{path} holds no merges: a list of pairs is needed")
    rows = [tuple(row.split(" ")) if isinstance(row, str) else row for row in data]
    for row in rows:
        texts = isinstance(row, (tuple, list)) and all(isinstance(part, str) and part for part in row)
        if not texts or len(row) != 2:
            raise CorruptFile(f"{path}: a merge must be two tokens, not {row!r}")
    return [(first, second) for first, second in rows]
