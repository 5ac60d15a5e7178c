"""What was measured, and on what: JSON that is written anew after every measurement, so that a run cut short counts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "triton", "numpy", "safetensors", "huggingface_hub")


class Results:
    """A list of measurements, each a dict with ``case``, ``contestant`` and what its case measures, kept in a file."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"about": about, "measured": [], "dropped": []}
        self.write()

    def add(self, case: str, contestant: str, **values: Any) -> None:
        self.data["measured"].append({"case": case, "contestant": contestant, **values})
        self.write()

    def drop(self, case: str, why: str) -> None:
        """Notes a case, or a contestant's part of it, that was not run."""
        self.data["dropped"].append({"case": case, "why": why})
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


class Table:
    """Reads results by case and contestant."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.about: dict[str, Any] = data["about"]
        self.rows: list[dict[str, Any]] = data["measured"]
        self.dropped: list[dict[str, str]] = data["dropped"]

    @classmethod
    def read(cls, path: Path) -> Table:
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def of(self, case: str, **same: Any) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            if row["case"] == case and all(row.get(key) == value for key, value in same.items()):
                yield row

    def values(self, case: str, quantity: str, **same: Any) -> list[float]:
        return [row[quantity] for row in self.of(case, **same) if quantity in row]

    def contestants(self, case: str) -> list[str]:
        return list(dict.fromkeys(row["contestant"] for row in self.of(case)))


def median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def about(device: str, options: dict[str, Any]) -> dict[str, Any]:
    """The machine, the versions, the state of this checkout, and how the run was asked for."""
    return {
        "device": device,
        "name": device_name(device),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "cuda": cuda_version() if device == "cuda" else None,
        "commit": commit(),
        "options": options,
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    """Asked for in another process: this one must not take memory on the device."""
    if device == "cpu":
        return processor_name()
    code = f"import torch; print(torch.{device}.get_device_name() if '{device}' == 'cuda' else '{device}')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def cuda_version() -> str:
    code = "import torch; print(torch.version.cuda, torch.backends.cudnn.version())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit; with a plus where files were changed since. Empty where git does not know."""
    here = Path(__file__).parent
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")
