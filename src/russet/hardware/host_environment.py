"""What matters on a machine besides its device: the model cache, the login at the Hub, environment variables."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PREFIX = "PYTORCH_"


@dataclass(frozen=True, kw_only=True)
class HostEnvironment:
    """``cache`` is the folder of the Hub's downloads and ``disk_free`` the bytes free on its disk.

    ``variables`` holds those environment variables that change what PyTorch does.
    """

    cache: str
    disk_free: int
    logged_in: bool
    variables: Mapping[str, str]


def read_host_environment() -> HostEnvironment:
    """The host environment of this process; of the Hub's token only whether there is one."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    return HostEnvironment(
        cache=str(cache),
        disk_free=shutil.disk_usage(existing(cache)).free,
        logged_in=get_token() is not None,
        variables={name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIX)},
    )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
