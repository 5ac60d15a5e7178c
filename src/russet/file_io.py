"""Small files: text is read whole within a limit; anything is written to a temporary file, which is then renamed.

A checkpoint's JSON files and word lists may be hostile, so whatever they hold, reading raises none but Russet's errors.
A write that is cut short (disk full, Ctrl-C) leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from russet.errors import CheckpointError, CorruptFile, MissingFile

LARGEST = 64 << 20
"""Bytes. The largest text file of a real checkpoint, a tokenizer.json, has 4 MB."""
DEEPEST = 32
"""Levels of nesting in JSON. A tokenizer.json has seven."""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        MissingFile, CheckpointError: it is not there, or cannot be read.
        CorruptFile: it is larger than ``LARGEST``, not UTF-8, or a Git LFS pointer.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise MissingFile(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > LARGEST:
        raise CorruptFile(f"{path} is larger than {LARGEST >> 20} MiB: too large for a file of its kind")
    if data.startswith(b"version https://git-lfs"):
        raise CorruptFile(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFile(f"{path} is not UTF-8 text: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises as ``read_text`` and ``parse_json`` do, and CorruptFile if it is no object."""
    text = read_text(path)
    if not text.strip():
        raise CorruptFile(f"{path} is empty; download it again")
    data = parse_json(text, str(path))
    if not isinstance(data, dict):
        raise CorruptFile(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


def parse_json(data: str | bytes, where: str, *, unique: bool = False) -> Any:
    """Parses JSON (UTF-8) that may be hostile; ``unique`` refuses a key that is given twice.

    Raises:
        CorruptFile: it is not JSON, nests deeper than ``DEEPEST``, or has an integer of more than 100 digits.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        parsed = json.loads(text, parse_int=_bounded_int, object_pairs_hook=_unique_keys if unique else None)
    except RecursionError:
        raise CorruptFile(f"{where}: its JSON nests too deep") from None
    except ValueError as error:  # bad UTF-8, bad JSON, and the two of our own below
        raise CorruptFile(f"{where}: its JSON cannot be read: {str(error)[:300]}") from None
    level = [parsed] if isinstance(parsed, (dict, list)) else []  # the containers at one depth
    for _ in range(DEEPEST):
        children = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
        level = [child for child in children if isinstance(child, (dict, list))]
    if level:
        raise CorruptFile(f"{where}: its JSON nests too deep")
    return parsed


def _bounded_int(digits: str) -> int:
    if len(digits) > 100:  # transformers writes 10**30 for a length that it does not know
        raise ValueError("a number has more than 100 digits")
    return int(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"the key {key[:200]!r} is given twice")
        data[key] = value
    return data


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file in one step: whoever reads ``path`` sees the old text or the new, never a part.

    Raises:
        CheckpointError: it cannot be written.
    """
    part = aside(path)
    try:
        part.write_bytes(text.encode("utf-8"))
        os.replace(part, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes a JSON object as Diffusers and transformers do: two spaces, sorted keys, a newline at the end."""
    write_text(path, json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def aside(path: Path) -> Path:
    """A name beside ``path`` that nothing else uses: what is written there can be moved to ``path`` in one step."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
