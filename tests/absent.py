"""What tests do without: references that are not installed, and arithmetic that this torch's CPU does not have.

Where ``diffusers`` or another reference is not installed (there is none for PyTorch 1.13), importing it gives an object
that skips the test which uses it; Russet's own modules still get the ImportError that they would get anywhere else.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

REFERENCES = ("accelerate", "diffusers", "torchsde", "transformers")
RUSSET = Path(__file__).parents[1] / "src"


class Absent(types.ModuleType):
    """Stands for a module, and for anything in it; to call it is to skip the test."""

    def __getattr__(self, name: str) -> Absent:
        if name == "__signature__":
            self()
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **options: Any) -> Any:
        pytest.skip(f"{self.__name__} is a reference, and it is not installed")


class Finder:
    """Finds the modules of references that are not installed, for whoever imports them but Russet."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.names or self.for_russet():
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def for_russet(self) -> bool:
        frame = sys._getframe(2)
        while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        return Path(frame.f_code.co_filename).is_relative_to(RUSSET)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Absent:
        return Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def installed(name: str) -> bool:
    """Whether a package is there, and not a stand-in for it."""
    module = sys.modules.get(name)
    return not isinstance(module, Absent) and (module is not None or importlib.util.find_spec(name) is not None)


def stand_in() -> None:
    """Puts stand-ins in the place of references that are not installed; ``importorskip`` skips for them as before."""
    missing = [name for name in REFERENCES if importlib.util.find_spec(name) is None]
    usual = pytest.importorskip

    def importorskip(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] in missing:
            pytest.skip(f"{name} is a reference, and it is not installed", allow_module_level=True)
        return usual(name, *args, **options)

    if missing:
        sys.meta_path.append(Finder(missing))  # type: ignore[arg-type]
        pytest.importorskip = importorskip  # type: ignore[assignment]


@functools.cache
def why_no_half() -> str:
    """Why networks cannot run in float16 on this torch's CPU, found by trying; empty where they can."""
    x, weight = torch.ones(1, 2, 3, 3).half(), torch.ones(2, 2, 1, 1).half()
    try:
        (F.group_norm(F.conv2d(x, weight), 1).sin() @ x).softmax(-1)
    except RuntimeError as error:
        return f"the CPU of torch {torch.__version__} does not compute in float16: {error}"
    return ""


def skip_without_half(item: pytest.Item) -> None:
    """Skips a test that is marked ``cpu_half`` where its arithmetic is not there."""
    if item.get_closest_marker("cpu_half") and (reason := why_no_half()):
        pytest.skip(reason)
