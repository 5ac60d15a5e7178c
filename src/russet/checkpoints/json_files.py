"""JSON files of a checkpoint, read as a stranger's text: bounded in size, depth and digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from russet.checkpoints.stored import StoredFile
from russet.errors import CorruptFile

SIZE_LIMIT = 64 << 20  # bytes; the index of a sharded model is the longest, with less than one
DEPTH_LIMIT = 32


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, such as a config.

    Raises:
        MissingFile: the file is not there or may not be read.
        CorruptFile: it is not a JSON object, or too long to be one of a checkpoint's.
    """
    file = StoredFile.at(path)
    if file.size > SIZE_LIMIT:
        raise CorruptFile(f"{path} has {file.size} bytes; more than {SIZE_LIMIT} are refused for JSON")
    raw = file.read_bytes(0, file.size)
    if why := file.placeholder():
        raise CorruptFile(why)
    data = parse_json(raw, str(path))
    if not isinstance(data, dict):
        raise CorruptFile(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


def parse_json(raw: bytes, where: str, *, unique: bool = False) -> Any:
    """Parses JSON that may be hostile; ``unique`` refuses a key that is given twice.

    Raises:
        CorruptFile: it is not JSON, or nests too deep, or holds a number of more digits than 64 bits need.
    """
    try:
        text = raw.decode("utf-8")
        data = json.loads(text, parse_int=_bounded_int, object_pairs_hook=_unique_keys if unique else None)
    except RecursionError:
        raise CorruptFile(f"{where}: its JSON nests too deep") from None
    except ValueError as error:  # covers bad UTF-8, bad JSON and our own two
        raise CorruptFile(f"{where}: its JSON cannot be read: {str(error)[:300]}") from None
    if _deeper(data, DEPTH_LIMIT):
        raise CorruptFile(f"{where}: its JSON nests too deep")
    return data


def _deeper(data: Any, limit: int) -> bool:
    """Whether lists and objects nest more than ``limit`` times, found without recursion."""
    level = [data]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return any(isinstance(item, (dict, list)) for item in level)


def _bounded_int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("a number has more than 20 digits")
    return int(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:200]!r} is given twice")
    return data
