"""The arguments of ``from_pretrained``, checked before anything is read: the source, the options, the precision."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from russet.errors import ArgumentTypeError, InputError, MissingFile, UnsupportedArgument

if TYPE_CHECKING:
    import torch

MINI = Path(__file__).parents[1] / "mini"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")

# The Hub's own rule: letters, digits, - _ . in both halves, no two of - or . in a row, none of them at an end.
_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_]|[-.](?![-.]))*(?<![-.])"
_HUB_ID = re.compile(rf"{_WORD}/{_WORD}")
_HUB_ID_LIMIT = 96

# What models can be in, by the names that people use for it.
DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float64": "float64",
}

_OPTION_TYPES: dict[str, tuple[type, ...]] = {
    "variant": (str, type(None)),
    "revision": (str, type(None)),
    "cache_dir": (str, type(None), os.PathLike),
    "local_files_only": (bool,),
    "token": (str, type(None), bool),
    "force_download": (bool,),
    "use_safetensors": (bool, type(None)),
}

# One for all models, or by component; None is float32.
Precision = Union["torch.dtype", Mapping[str, "torch.dtype"], None]


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


@dataclasses.dataclass(frozen=True)
class Options:
    """Which files to take, and how to reach the Hub.

    Args:
        variant: take ``….VARIANT.…`` files where there are such, "fp16" or "non_ema" for example.
        revision: a branch, tag or commit of the Hub repository.
        cache_dir: where downloads are kept; None is huggingface_hub's cache.
        local_files_only: never ask the Hub.
        token: of a Hub account; None or True is the one that ``hf auth login`` stored, False is none.
        force_download: fetch again what is in the cache.
        use_safetensors: True refuses pickles, False takes only pickles, None prefers safetensors.

    Raises:
        ArgumentTypeError, InputError: a value of a wrong type, or that cannot be.
    """

    variant: str | None = None
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    token: str | bool | None = None
    force_download: bool = False
    use_safetensors: bool | None = None

    def __post_init__(self) -> None:
        for name, allowed in _OPTION_TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, allowed):
                types = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
                raise ArgumentTypeError(f"{name} must be {types}, not {type(value).__name__}")
        if self.variant is not None and not (self.variant.isascii() and self.variant.replace("-", "_").isidentifier()):
            raise InputError(f'variant must be a word such as "fp16", not {self.variant!r}')
        if self.revision is not None and (not self.revision or {"", ".", ".."} & set(self.revision.split("/"))):
            raise InputError(f"revision must be a branch, tag or commit, not {self.revision!r}")
        if self.local_files_only and self.force_download:
            raise InputError("local_files_only and force_download cannot both be True")

    @property
    def cache(self) -> str | None:
        """``cache_dir`` as a text."""
        return None if self.cache_dir is None else os.fspath(self.cache_dir)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Options from keyword arguments.

        Raises:
            UnsupportedArgument: a name that is none of them.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(given) - set(names)):
            raise UnsupportedArgument(
                f"{', '.join(unknown)}: no such argument; there are subfolder, torch_dtype, dtype, {', '.join(names)}"
            )
        return cls(**given)


def read_dtype(
    *, torch_dtype: torch.dtype | str | None = None, dtype: torch.dtype | str | None = None
) -> torch.dtype | None:
    """The precision that a caller asked for under either name, as a ``torch.dtype`` or by name; None if under neither.

    Raises:
        ArgumentTypeError: neither a dtype nor a text.
        InputError: no precision that models can be in, or two different ones.
    """
    given = [_one_dtype(value) for value in (torch_dtype, dtype) if value is not None]
    if len(set(given)) > 1:
        raise InputError(f"torch_dtype={given[0]} and dtype={given[1]} contradict each other; give one")
    return given[0] if given else None


def _one_dtype(value: torch.dtype | str) -> torch.dtype:
    import torch

    if not isinstance(value, (str, torch.dtype)):
        raise ArgumentTypeError(f"a dtype must be a torch.dtype or its name, not {type(value).__name__}")
    name = DTYPES.get(str(value).removeprefix("torch."))
    if name is None:
        raise InputError(f"models cannot be in {value}; use torch.float32, torch.float16 or torch.bfloat16")
    found: torch.dtype = getattr(torch, name)
    return found


def precision_of(dtype: Precision, part: str) -> torch.dtype:
    """The precision of one component."""
    import torch

    if isinstance(dtype, Mapping):
        return dtype.get(part) or dtype.get("default") or torch.float32
    return dtype or torch.float32
