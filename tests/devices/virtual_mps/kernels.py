"""Which operators run on mps: read from torch's own ``native_functions.yaml``, and from older releases' differences.

That file ships inside every torch package and is what torch's dispatcher is generated from. An operator runs on mps if
the file gives it an MPS kernel, itself or through its structured delegate, or a composite one that is made of others.
It is read line by line, because a YAML parser takes seconds for its 16,000 lines.

For a virtual torch older than the installed one, ``kernels_since.txt`` lists what had no kernel yet. It was made by
``python -m virtual_mps.kernels FOLDER``, where FOLDER holds the file of each older release as ``VERSION.yaml``.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent

KERNEL, COMPOSITE, IMPLICIT = "kernel", "composite", "implicit"

IN_CODE = ("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not")  # up to torch 2.0 they were not in the file

Version = tuple[int, ...]


@dataclass
class Entry:
    """One operator of the file: the backends that have a kernel, and the operator that a structured one leans on."""

    keys: set[str] = field(default_factory=set)
    delegate: str = ""
    has_table: bool = False

    def runs_on_mps(self, entries: dict[str, Entry]) -> str | None:
        """``KERNEL``, ``COMPOSITE`` (made of other operators), ``IMPLICIT`` (nothing but other operators) or None."""
        target = entries.get(self.delegate, self)
        if "MPS" in self.keys | target.keys:
            return KERNEL
        if "CompositeImplicitAutograd" in self.keys or not (self.has_table or self.delegate):
            return IMPLICIT  # without a dispatch table it is composite on every backend
        if any(key.startswith("CompositeExplicitAutograd") for key in self.keys):
            return COMPOSITE
        return None


def read_operators(text: str) -> dict[str, str | None]:
    """How each operator of a ``native_functions.yaml`` (``"add.Tensor"``) runs on mps, if at all."""
    entries: dict[str, Entry] = {}
    generated: dict[str, str] = {}  # operators that torch derives from another
    name, in_dispatch = "", False
    for line in text.splitlines():
        if started := re.match(r"- func: ([\w.]+)\(", line):
            name, in_dispatch = started.group(1), False
            entries[name] = Entry()
        elif found := re.match(r"  (\w+):\s*(.*)", line):
            word, rest = found.groups()
            in_dispatch = word == "dispatch"
            entries[name].has_table |= in_dispatch
            if word == "structured_delegate":
                entries[name].delegate = rest.strip()
            elif word == "autogen":
                generated.update(dict.fromkeys((item.strip() for item in rest.split(",")), name))
        elif in_dispatch and (found := re.match(r"    ([\w, ]+): ", line)):
            entries[name].keys.update(key.strip() for key in found.group(1).split(","))
    status = {name: entry.runs_on_mps(entries) for name, entry in entries.items()}
    return {**{made: status[base] for made, base in generated.items()}, **status}


@functools.cache
def installed_operators() -> dict[str, str | None]:
    """``read_operators`` of the installed torch."""
    torchgen = importlib.util.find_spec("torchgen")
    assert torchgen is not None
    assert torchgen.origin is not None
    return read_operators((Path(torchgen.origin).parent / "packaged/ATen/native/native_functions.yaml").read_text())


@functools.cache
def kernels_since() -> dict[str, Version]:
    """The first torch release in which an operator ran on mps, for those that did not from the start."""
    since: dict[str, Version] = {}
    for line in (HERE / "kernels_since.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            release, names = line.split(":")
            since.update(dict.fromkeys(names.split(), version(release)))
    return since


def status(operator: str, torch: Version) -> str | None:
    """How an operator (``"add.Tensor"``) runs on the mps of a torch version, installed or not; None: it does not."""
    found = installed_operators().get(operator)
    since = kernels_since().get(operator)
    if since is None:
        return KERNEL if operator.startswith(IN_CODE) else found
    return (found or KERNEL) if torch >= since else None


def version(text: str) -> Version:
    """``"2.13.0+cpu"`` → (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", text)
    if not found:
        raise ValueError(f"no version: {text!r}")
    return tuple(int(part) for part in found.group(0).split("."))


def differences(folder: Path) -> dict[Version, list[str]]:
    """From each release's file in ``folder``: the operators that run on mps since that release."""
    releases = sorted((version(path.stem), read_operators(path.read_text())) for path in folder.glob("*.yaml"))
    since: dict[Version, list[str]] = {}
    running: set[str] = set()
    for number, (release, operators) in enumerate(releases):
        now = {name for name, how in operators.items() if how}
        if number:
            since[release[:2]] = sorted(name for name in now - running if not name.startswith(IN_CODE))
        running |= now
    return since


if __name__ == "__main__":
    for release, names in differences(Path(sys.argv[1])).items():
        label = ".".join(map(str, release)) + ": "
        print(textwrap.fill(" ".join(names), 120, initial_indent=label, subsequent_indent=label))
