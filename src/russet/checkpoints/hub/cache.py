"""The models in huggingface_hub's cache: which there are, one more, one less."""

from __future__ import annotations

import dataclasses
import datetime
import os
import shutil
from pathlib import Path
from typing import Any

from russet.checkpoints import folder
from russet.checkpoints.arguments import Options, is_hub_id
from russet.checkpoints.hub import download
from russet.errors import CheckpointError, InputError, MissingFile


@dataclasses.dataclass(frozen=True)
class CachedModel:
    """One repository in the cache. ``size`` is in bytes."""

    name: str
    size: int
    last_used: datetime.datetime
    path: Path


def pull(model: str, options: Options | None = None) -> Path:
    """Fetches a pipeline from the Hub, so that it can be used without a network; the folder that it lies in.

    Raises:
        InputError: ``model`` is no Hub id.
        CheckpointError: as ``hub.fetch_pipeline``.
    """
    if not isinstance(model, str) or not is_hub_id(model):
        raise InputError(f'{model!r} is not a Hub id, which has the form "owner/name"')
    return download.fetch_pipeline(model, options or Options())


def cached_models(cache_dir: str | os.PathLike[str] | None = None) -> list[CachedModel]:
    """The repositories in the cache that hold a pipeline or weights in a single file, last used first."""
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils  # which has the error in every version, some without declaring it
    try:
        found = huggingface_hub.scan_cache_dir(Options(cache_dir=cache_dir).cache)
    except utils.CacheNotFound:
        return []
    models = [
        CachedModel(
            repo.repo_id, repo.size_on_disk, datetime.datetime.fromtimestamp(repo.last_accessed), repo.repo_path
        )
        for repo in found.repos
        if repo.repo_type == "model" and any(_is_model(file.file_name) for rev in repo.revisions for file in rev.files)
    ]
    return sorted(models, key=lambda model: model.last_used, reverse=True)


def remove(model: str, cache_dir: str | os.PathLike[str] | None = None) -> int:
    """Deletes a model from the cache; how many bytes that freed.

    Raises:
        MissingFile: the cache does not have it.
        CheckpointError: its files cannot be deleted.
    """
    models = {entry.name: entry for entry in cached_models(cache_dir)}
    if model not in models:
        there = f"; there are {', '.join(sorted(models))}" if models else ""
        raise MissingFile(f"{model!r} is not in the cache of downloads{there}")
    try:
        # Not by huggingface_hub, which goes by commits: a mirror has the same ones as the repository that it copies.
        shutil.rmtree(models[model].path)
    except OSError as error:
        raise CheckpointError(f"{models[model].path} cannot be deleted: {error.strerror or error}") from error
    return models[model].size


def _is_model(name: str) -> bool:
    return name == folder.INDEX or name.endswith((".safetensors", ".ckpt"))
