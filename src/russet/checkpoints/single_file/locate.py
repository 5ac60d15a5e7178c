"""What a caller means by a single file: a file on this machine, or one in a repository on the Hub."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from russet.checkpoints.arguments import WEIGHT_SUFFIXES, Options, is_hub_id
from russet.errors import ArgumentTypeError, InputError, MissingFile

HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")


class HubFile(NamedTuple):
    """A file in a Hub repository; ``revision`` is None where the address does not say."""

    repository: str
    path: str
    revision: str | None = None


def locate_file(source: str | os.PathLike[str], options: Options) -> Path:
    """The file that ``source`` names, fetched from the Hub where that is meant. A file that exists here wins.

    Raises:
        ArgumentTypeError: neither text nor a path.
        MissingFile: a path where there is nothing.
        InputError: a folder, or an address that is not the Hub's.
        HubError: the Hub did not give it.
    """
    if not isinstance(source, (str, os.PathLike)) or not isinstance(os.fspath(source), str):
        raise ArgumentTypeError(f"a file is named by a text or a path, not by {type(source).__name__}")
    name = os.fspath(source)
    if not name.strip() or "\0" in name:
        raise InputError(f"{name!r} names no file")
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return path
        is_folder = path.is_dir()
    except OSError as error:  # a name that the system refuses, for its length
        raise InputError(f"{name[:200]!r} cannot be a path: {error.strerror}") from None
    if is_folder:
        raise InputError(f"{name} is a folder; load it with from_pretrained, or name a file in it")
    found = hub_file(name) if isinstance(source, str) else None
    if found is None:
        raise MissingFile(
            f"there is no file {path.absolute()}; one on the Hub is named "
            '"https://huggingface.co/owner/name/blob/main/file.safetensors" or "owner/name/file.safetensors"'
        )
    if found.revision and options.revision and found.revision != options.revision:
        raise InputError(f"the address says revision {found.revision!r}, revision= says {options.revision!r}; give one")
    from russet.checkpoints.hub import download

    wanted = dataclasses.replace(options, revision=found.revision or options.revision)
    return download.fetch_file(found.repository, found.path, wanted)


def hub_file(name: str) -> HubFile | None:
    """The Hub's file that a text means, None where it means none.

    Raises:
        InputError: the address of another site.
    """
    text = name if "://" in name or not name.startswith(HOSTS) else f"https://{name}"
    if "://" in text:
        return _address(text)
    if text.startswith((".", "/", "~")):
        return None
    parts = PurePosixPath(text).parts
    repository, path = "/".join(parts[:2]), "/".join(parts[2:])
    meant = path.endswith(WEIGHT_SUFFIXES) and is_hub_id(repository) and _inside(path) and "\\" not in name
    return HubFile(repository, path) if meant else None


def _address(text: str) -> HubFile:
    """https://huggingface.co/owner/name/(blob|resolve)/revision/path; a slash in the revision is written %2F."""
    url = urlsplit(text)
    match = re.fullmatch(r"/([^/]+/[^/]+)/(?:blob|resolve)/(refs/pr/\d+|[^/]+)/(.+)", url.path)
    if url.scheme not in ("https", "http") or url.hostname not in HOSTS:
        raise InputError(f"{text} is not an address on huggingface.co; download the file and give its path")
    repository, revision, path = map(unquote, match.groups()) if match else ("", "", "")
    if not is_hub_id(repository) or not _inside(path):
        raise InputError(
            f"{text} is not the address of a file; those look like …/owner/name/blob/main/file.safetensors"
        )
    return HubFile(repository, path, revision)


def _inside(path: str) -> bool:
    """Whether a path stays in the folder that it begins in."""
    return bool(path) and not path.startswith("/") and ".." not in PurePosixPath(path).parts
