"""Weight files of full size that take no room: a real header, and data that is a hole in the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

SIZES = {"F16": 2, "BF16": 2, "F32": 4, "I64": 8}


def write_sparse(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str | Mapping[str, str] = "F16",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A safetensors file of tensors of zeros; ``dtype`` for all, or by the beginning of their names."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        kind = dtype if isinstance(dtype, str) else next(d for start, d in dtype.items() if name.startswith(start))
        start, end = end, end + prod(shape) * SIZES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path
