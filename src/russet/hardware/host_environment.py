"""What is around the machine's device: where models are kept, whether the Hub knows the user, what is set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PREFIX = "PYTORCH_"


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """``cache`` is the folder of the Hub's downloads and ``disk_free`` the bytes free on its disk.

    ``environment`` holds those variables that change what PyTorch does.
    """

    cache: str
    disk_free: int
    logged_in: bool
    environment: Mapping[str, str]


def look_around() -> Surroundings:
    """The surroundings of this process; of the Hub's token no more than whether there is one."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    return Surroundings(
        cache=str(cache),
        disk_free=shutil.disk_usage(existing(cache)).free,
        logged_in=get_token() is not None,
        environment={name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIX)},
    )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
