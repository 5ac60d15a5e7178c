"""What a caller means by a source: the embedded model, a folder on this machine, or a repository on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from russet.errors import ArgumentTypeError, InputError, MissingFile

MINI = Path(__file__).parents[1] / "mini"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")

# The Hub's own rule: letters, digits, - _ . in both halves, no two of - or . in a row, none of them at an end.
_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_]|[-.](?![-.]))*(?<![-.])"
_HUB_ID = re.compile(rf"{_WORD}/{_WORD}")
_HUB_ID_LIMIT = 96


def locate(source: str | os.PathLike[str]) -> Path | str:
    """The folder that ``source`` names, or the id of the Hub repository.

    A folder that exists wins over a repository of the same name. ``"mini"`` is the embedded model, unless a folder of
    that name holds a model itself.

    Raises:
        ArgumentTypeError: neither text nor a path.
        MissingFile: a path where there is no folder.
        InputError: a single file, or what can be neither path nor repository.
    """
    if not isinstance(source, (str, os.PathLike)) or not isinstance(os.fspath(source), str):
        raise ArgumentTypeError(f"a model is named by a text or a path, not by {type(source).__name__}")
    name = os.fspath(source)
    if not name.strip() or "\0" in name:
        raise InputError(f'{name!r} names no model; give "mini", a folder, or a Hub id such as "owner/name"')
    if name == "mini" and isinstance(source, str) and not Path(name, "model_index.json").is_file():
        return MINI
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return path
        is_file = path.is_file()
    except OSError as error:  # a name that the system refuses, for its length
        raise InputError(f"{name[:200]!r} cannot be a path: {error.strerror}") from None
    if is_file:
        raise InputError(f"{name} is a single file; load it with StableDiffusionPipeline.from_single_file")
    if isinstance(source, str) and is_hub_id(name) and path.suffix not in WEIGHT_SUFFIXES:
        return name
    raise _nothing_there(name, path)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form of a Hub repository's id, "owner/name"."""
    return len(name) <= _HUB_ID_LIMIT and _HUB_ID.fullmatch(name) is not None and not name.endswith(".git")


def _nothing_there(name: str, path: Path) -> MissingFile | InputError:
    if name.startswith(("http://", "https://")):
        return InputError(
            f'{name} is an address; give the repository\'s id ("owner/name"), or load a single file with '
            "StableDiffusionPipeline.from_single_file"
        )
    if path.suffix in WEIGHT_SUFFIXES:
        return MissingFile(f"there is no file {path.absolute()}; single files are loaded with from_single_file")
    if os.sep in name or name.startswith((".", "~")) or "\\" in name:
        return MissingFile(
            f'there is no folder {path.absolute()}, and {name!r} is not a Hub id, which has the form "owner/name"'
        )
    return MissingFile(
        f'{name!r} is not "mini", no folder of that name is in {Path.cwd()}, and it is not a Hub id, '
        'which has the form "owner/name"'
    )
