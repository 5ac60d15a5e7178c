"""Networks are plain: they know PyTorch, configs and one another, and nothing of how they are made faster."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import russet.models

SOURCE = Path(russet.models.__file__).parent
FILES = {path.name: path for path in sorted(SOURCE.glob("**/*.py"))}
RUSSET = ("russet.errors", "russet.config", "russet.component", "russet.models")
UNET = ("unet.py", "unet_blocks.py", "transformer.py", "resnet.py")
PLUMBING = (
    "hooked", "data_ptr", "_forward_hooks", "_forward_pre_hooks", "triton", "donat", "packed", "folded", "cudnn",
    "mkldnn", "is_cuda", "_version", "__class__", "weakref", "is_grad_enabled", "inference_mode", "add_", "mul_",
)  # fmt: skip
LISTED = {"footprint.py": ("donat", "folded"), "unet_footprint.py": ("donat",), "vae_footprint.py": ("donat",)}
"""Files that do not compute, and what they need beyond: the memory that a call takes, also with what passes do."""


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names(tree: ast.Module) -> Iterator[str]:
    """Every name and attribute in a file's code, and no word of its prose."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg


def has_plumbing(name: str, allowed: tuple[str, ...] = ()) -> bool:
    whole = ("add_", "mul_", "_version")  # "added" and "__version__" are something else
    words = [word for word in PLUMBING if word not in allowed]
    return any(name == word if word in whole else word in name.lower() for word in words)


@pytest.mark.parametrize("name", FILES)
def test_a_network_imports_torch_configs_and_other_networks_only(name: str) -> None:
    for module in imported(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        top = module.split(".")[0]
        known = top == "torch" or (top in sys.stdlib_module_names and top != "weakref")
        assert known or module.startswith(RUSSET), module


@pytest.mark.parametrize("name", FILES)
def test_no_network_knows_of_dispatch_hooks_devices_or_packed_weights(name: str) -> None:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    found = {one for one in names(tree) if has_plumbing(one, LISTED.get(name, ()))}
    assert not found
    device_types = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "type"
        and isinstance(node.value, ast.Attribute) and node.value.attr == "device"
    ]  # fmt: skip
    assert not device_types


def test_what_is_looked_for_is_found_where_it_is() -> None:
    code = "def run(x):\n    if x.device.type == 'mps' and hooked(x):\n        return x.add_(Donated(x))"
    assert {one for one in names(ast.parse(code)) if has_plumbing(one)} == {"hooked", "add_", "Donated"}
    assert not has_plumbing("added")


def test_a_unet_with_its_blocks_fits_on_a_few_pages() -> None:
    lines = sum(len(FILES[name].read_text(encoding="utf-8").splitlines()) for name in UNET)
    assert lines <= 600
