"""What many tests of checkpoints are made from: a small model, and files put together by hand."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

needs_float8 = pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="torch before 2.1 has no float8")


class Tiny(nn.Module):
    """A model with one of each kind of layer that checkpoints hold, and a buffer that is computed."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.GroupNorm(1, 3)
        self.words = nn.Embedding(5, 2)
        self.register_buffer("positions", torch.arange(6), persistent=False)


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, as JSON data or as raw bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def torch_zip(path: Path, pickled: bytes, storages: Mapping[str, bytes] = {}, **facts: Any) -> Path:
    """A zip file in the form of torch.save; ``facts`` go to the ZipFile."""
    with zipfile.ZipFile(path, "w", **facts) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def called(module: str, name: str, *arguments: Any) -> bytes:
    """A pickle that calls a function when Python reads it."""
    inner = pickle.dumps(arguments, 2)[2:-1]  # without PROTO and STOP
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + inner + b"R."
