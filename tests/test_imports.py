"""Which part may import which, what importing costs, and what the package offers."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import russet

SOURCE = Path(russet.__file__).parent
ROOT = {"errors", "file_io", "config", "component", "validation", "rng"}
ALLOWED = {
    "errors": set(),
    "file_io": {"errors"},
    "config": {"errors"},
    "component": {"errors", "config"},
    "validation": {"errors"},
    "rng": {"errors"},
    "images": ROOT,
    "text": ROOT,
    "models": ROOT,
    "schedulers": ROOT,
    "hardware": ROOT,
    "backends": ROOT | {"models"},
    "passes": ROOT | {"models", "hardware", "backends"},
    "planning": ROOT | {"models", "hardware", "backends", "passes"},
    "checkpoints": ROOT | {"images", "text", "models", "schedulers"},
    "families": ROOT | {"images", "text", "models", "schedulers", "hardware", "backends", "planning", "checkpoints"},
    "residency": ROOT | {"models", "hardware", "backends", "passes", "planning", "checkpoints"},
    "generate": ROOT
    | {"images", "text", "models", "schedulers", "hardware", "backends", "passes", "planning", "families", "residency"},
}
"""Part → the parts that it may import, besides itself. The arrows of CONTRIBUTING.md, from right to left."""

BELOW = ROOT | {*ALLOWED}
ALLOWED |= {
    "pipelines": BELOW,
    "diagnostics": BELOW | {"pipelines", "__init__"},
    "cli": BELOW | {"pipelines", "diagnostics", "__init__"},
    "__init__": BELOW | {"pipelines"},
    "__main__": {"cli"},
}

NEVER = ("diffusers", "transformers", "accelerate", "typer", "rich")
HEAVY = ("torch", "numpy", "PIL", "tokenizers", "safetensors", "huggingface_hub", "tqdm", "psutil")


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """The full names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def target(name: str) -> str:
    """The part that an imported name of russet belongs to: ``russet.models.unet.X`` → ``models``."""
    second = name.split(".")[1] if "." in name else ""
    known = bool(second) and ((SOURCE / second).is_dir() or (SOURCE / f"{second}.py").is_file())
    return second if known else "__init__"


def test_parts_import_in_one_direction():
    wrong = [
        f"{path} imports {name}"
        for path, tree in trees()
        for name in imports(tree)
        if name.split(".")[0] == "russet" and target(name) not in ALLOWED[part(path)] | {part(path)}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others():
    """Imports within functions and for type checkers included."""
    files = {
        ".".join(("russet", *path.with_suffix("").parts)).removesuffix(".__init__"): tree for path, tree in trees()
    }
    graph = {
        name: {one if one in files else one.rpartition(".")[0] for one in imports(tree)} & files.keys() - {name}
        for name, tree in files.items()
    }
    left = dict(graph)
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in free:
            del left[name]
    assert not left, {name: sorted(imported & left.keys()) for name, imported in left.items()}


def test_what_is_never_a_dependency_is_never_imported():
    wrong = [f"{path}: {name}" for path, tree in trees() for name in imports(tree) if name.split(".")[0] in NEVER]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_prints():
    wrong = [
        f"{path}:{node.lineno}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong, "\n".join(wrong)


LIGHT_MODULES = ["russet", "russet.errors", "russet.config", "russet.file_io", "russet.images.png", "russet.cli"]


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_importing_it_alone_imports_nothing_heavy(module):
    heavy = loaded_by(f"import {module}") & set(HEAVY)
    assert not heavy


def test_help_imports_nothing_heavy():
    code = "from russet.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert not loaded_by(code) & set(HEAVY)


def test_a_pipeline_imports_neither_diffusers_nor_transformers():
    loaded = loaded_by("from russet import StableDiffusionPipeline")
    assert "torch" in loaded
    assert not loaded & {*NEVER, "huggingface_hub", "scipy", "pandas"}


PIPELINE = ("component", "config", "errors", "file_io", "rng", "validation")
PIPELINE += ("images", "text", "models", "schedulers", "hardware", "backends", "passes", "planning", "checkpoints")
PIPELINE += ("families", "residency", "generate", "pipelines")
LATE = {"tokenizers", "safetensors", "PIL", "psutil", "tqdm", "huggingface_hub", "html", "triton"}
LATE |= {"checkpoints.single_file", "checkpoints.hub", "checkpoints.save", "backends.triton", "images.png"}
"""What is imported when a pipeline first needs it: libraries, and modules of russet."""


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "DiffusionPipeline"])
def test_importing_a_pipeline_loads_torch_and_the_parts_that_every_picture_takes(name):
    new = modules_loaded_by(f"from russet import {name}") - modules_loaded_by("import torch")
    libraries = {module.split(".")[0] for module in new} - {"russet", *sys.stdlib_module_names}
    libraries -= {"packaging"}  # by torch 1.13, late
    assert not libraries, "only torch, and what it imports itself"
    ours = {module.removeprefix("russet.") for module in new if module.startswith("russet.")}
    assert {module.split(".")[0] for module in ours} <= {*PIPELINE}
    late = {module for module in new | ours if any(f"{module}.".startswith(f"{one}.") for one in LATE)}
    assert not late


def test_the_collector_runs_again_once_a_pipeline_is_imported():
    code = "import gc, russet\nrusset.StableDiffusionPipeline\nassert gc.isenabled()\n"
    off = "import gc, russet\ngc.disable()\nrusset.StableDiffusionPipeline\nassert not gc.isenabled()\n"
    assert "torch" in loaded_by(code) & loaded_by(off)


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh Python has loaded after running ``code``."""
    return {name.split(".")[0] for name in modules_loaded_by(code)}


def modules_loaded_by(code: str) -> set[str]:
    report = "import sys; print('\\nloaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_every_public_name_is_where_the_table_says():
    for name, home in russet.HOMES.items():
        found = getattr(russet, name)
        assert found is getattr(importlib.import_module(home), name)
        assert found.__module__ == home, f"{name} is defined in {found.__module__}"


def test_the_public_names_are_sorted_and_the_type_checker_sees_the_same():
    assert list(russet.HOMES) == sorted(russet.HOMES) == list(russet.__all__)
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert seen == russet.HOMES


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="StableFusionPipeline"):
        russet.StableFusionPipeline  # noqa: B018
    assert "DiffusionPipeline" in dir(russet)
