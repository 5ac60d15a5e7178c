"""Checkpoints from the Hugging Face Hub: only the files that are needed, into huggingface_hub's cache.

The Hub is asked once what a repository holds; the choice of files is made from that list by the rules for local
folders. huggingface_hub does the rest: login, cache, resuming, progress, and it never hands out an incomplete file.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath

from russet.checkpoints import folder
from russet.checkpoints.arguments import Options
from russet.checkpoints.folder import ClassEntry
from russet.checkpoints.formats.weight_files import WeightFiles, check_variant, choose_weight_files
from russet.checkpoints.hub import errors
from russet.errors import HubError, MissingFile
from russet.file_io import read_json

log = logging.getLogger(__name__)

WORKERS = 4  # files at once: enough to fill a line, few enough progress bars to read
ANSWER_WITHIN = 5.0  # seconds for the Hub's first answer; the cache is used after that

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
)


def fetch_pipeline(repo: str, options: Options, skipped: Collection[str] = ()) -> Path:
    """The local copy of a pipeline's repository, with all files that loading it takes.

    Args:
        repo: "owner/name".
        skipped: components that the caller provides, whose files are not fetched.

    Raises:
        HubError: the Hub did not give it, and the cache does not have it.
        CheckpointError, ConfigError: what it holds is no pipeline that can be loaded.
    """
    view = _View.of(repo, options)
    index = _index(view)
    chosen: dict[str, WeightFiles] = {}
    names: list[str] = []
    for part, entry in index.entries(skipped).items():
        needed, files = _needed(view, part, entry, options)
        names += needed
        if files is not None:
            chosen[part] = files
    check_variant(chosen, options.variant, repo)
    return view.fetch_all(names)


def fetch_configs(repo: str, options: Options) -> Path:
    """The local copy of a pipeline's repository with its configs and tokenizers and no weights; raises as
    ``fetch_pipeline`` does.
    """
    view = _View.of(repo, options)
    files = {"config.json", "scheduler_config.json", *TOKENIZER_FILES}
    wanted = {f"{part}/{name}" for part in _index(view).parts for name in files}
    return view.fetch_all([folder.INDEX, *sorted(wanted & set(view.names))])


def _index(view: _View) -> folder.PipelineIndex:
    if folder.INDEX not in view.names:
        raise MissingFile(
            f"{view.repo} on the Hub has no {folder.INDEX}: it is not a pipeline in Diffusers form. A single file in "
            f'it is loaded with StableDiffusionPipeline.from_single_file("{view.repo}/FILE.safetensors")'
        )
    return folder.parse_index(read_json(view.fetch(folder.INDEX)), f"{view.repo}, {folder.INDEX}")


def fetch_component(repo: str, entry: ClassEntry, options: Options, subfolder: str = "") -> Path:
    """The local copy of a repository with the files of one component; raises as ``fetch_pipeline`` does."""
    view = _View.of(repo, options)
    if folder.INDEX in view.names and str(PurePosixPath(subfolder, entry.config_file)) not in view.names:
        raise MissingFile(f"{repo} is a whole pipeline; pass subfolder= to say which part of it is the {entry.name}")
    names, _ = _needed(view, subfolder, entry, options)
    return view.fetch_all(names)


def fetch_file(repo: str, name: str, options: Options) -> Path:
    """The local copy of one file of a repository; raises as ``fetch_pipeline`` does."""
    view = _View.of(repo, options)
    if name not in view.names:
        singles = sorted(
            found for found in view.names if found.endswith((".safetensors", ".ckpt")) and "/" not in found
        )
        there = f"; it has {', '.join(singles)}" if singles else ""
        raise MissingFile(f"{repo} on the Hub has no file {name!r}{there}")
    return view.fetch(name)


def _needed(view: _View, part: str, entry: ClassEntry, options: Options) -> tuple[list[str], WeightFiles | None]:
    """The files that a component takes, and those of its weights, if it has any."""
    inner = [PurePosixPath(name) for name in view.names]
    there = {path.name for path in inner if path.parent == PurePosixPath(part)}
    if entry.kind == "tokenizer":
        names: Sequence[str] = [name for name in TOKENIZER_FILES if name in there]
    else:
        names = [entry.config_file]
    where = f"{PurePosixPath(view.repo, part)}{view.whence}"
    weights = None
    if entry.kind == "model":
        weights = choose_weight_files(there, entry.stems, options.variant, options.use_safetensors, where)
        names = [*names, *weights.files]
    if not set(names) <= there or not names:
        lacking = ", ".join(sorted(set(names) - there)) or "a tokenizer's files"
        raise MissingFile(f"{where} lacks {lacking}")
    return [str(PurePosixPath(part, name)) for name in names], weights


class _View:
    """What a repository holds at one commit: from the Hub, or where it cannot be reached, from the cache."""

    def __init__(self, repo: str, options: Options, commit: str, names: Collection[str], cached: Path | None) -> None:
        self.repo, self.options, self.commit, self.names, self.cached = repo, options, commit, names, cached

    @classmethod
    def of(cls, repo: str, options: Options) -> _View:
        """Asks the Hub; uses the cache where it does not answer, may not be asked, or no longer has the model."""
        if options.local_files_only:
            return cls.in_cache(repo, options, HubError("the Hub may not be asked, because of local_files_only=True"))
        import huggingface_hub

        try:
            api = huggingface_hub.HfApi(library_name="russet")
            info = api.model_info(repo, revision=options.revision, timeout=ANSWER_WITHIN, token=options.token)
        except Exception as error:
            why = errors.translated(error, repo, options.revision)
            if options.force_download or not isinstance(why, HubError):
                raise why from error
            return cls.in_cache(repo, options, why)
        return cls(repo, options, str(info.sha), {sibling.rfilename for sibling in info.siblings or ()}, None)

    @classmethod
    def in_cache(cls, repo: str, options: Options, why: HubError) -> _View:
        """The newest commit of the revision that the cache has."""
        snapshot = find_snapshot(repo, options)
        if snapshot is None:
            raise HubError(f"{why} ({repo} is not in the cache of downloads either)")
        log.info("%s; using the copy of %s in the cache, %s", why, repo, snapshot)
        names = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
        return cls(repo, options, snapshot.name, names, snapshot)

    @property
    def whence(self) -> str:
        """Where the list of files comes from, for errors."""
        return " in the cache (the Hub was not asked)" if self.cached else " on the Hub"

    def fetch(self, name: str, revision: str | None = None) -> Path:
        """One file of the commit, from the cache if it is there; ``revision`` names the commit otherwise."""
        if self.cached is not None:
            return self.cached / name
        import huggingface_hub

        try:
            path = huggingface_hub.hf_hub_download(
                self.repo,
                name,
                revision=revision or self.commit,
                etag_timeout=ANSWER_WITHIN,
                force_download=self.options.force_download and revision is None,
                cache_dir=self.options.cache,
                token=self.options.token,
                library_name="russet",
            )
        except Exception as error:
            raise errors.translated(error, self.repo, self.options.revision, name) from error
        return Path(path)

    def fetch_all(self, names: Sequence[str]) -> Path:
        """All these files; the folder that they lie in.

        Only when all are there does the cache learn that the branch has come to this commit: until then, work without
        the network goes on with the complete one before it.
        """
        paths = at_once(self.fetch, names, WORKERS)
        snapshot = paths[0].parents[len(PurePosixPath(names[0]).parts) - 1]
        if self.cached is None and find_snapshot(self.repo, self.options) != snapshot:
            self.fetch(names[0], revision=self.options.revision or "main")
        return snapshot


def find_snapshot(repo: str, options: Options) -> Path | None:
    """The folder of the cache that holds a revision of a repository, as far as it was downloaded.

    The layout is documented: models--OWNER--NAME/refs/BRANCH names the commit, snapshots/COMMIT has its files.
    (huggingface.co/docs/huggingface_hub/guides/manage-cache)
    """
    from huggingface_hub import constants

    revision = options.revision or "main"
    base = Path(options.cache or constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"
    try:
        commit = (base / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        commit = revision
    snapshot = base / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def at_once(work: Callable[[str], Path], items: Sequence[str], workers: int) -> list[Path]:
    """Does ``work`` on all items, several at a time; the first error ends it.

    The threads are daemons, so that Ctrl-C ends the program and does not wait for gigabytes to arrive.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Path | Exception]] = queue.SimpleQueue()
    stop = threading.Event()
    for number in range(len(items)):
        todo.put(number)

    def run() -> None:
        while not stop.is_set():
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, work(items[number])))
            except Exception as error:
                stop.set()
                done.put((number, error))

    for _ in range(min(workers, len(items))):
        threading.Thread(target=run, daemon=True, name="russet-fetch").start()
    results: dict[int, Path] = {}
    try:
        while len(results) < len(items):
            number, result = done.get()
            if isinstance(result, Exception):
                raise result
            results[number] = result
    finally:
        stop.set()
    return [results[number] for number in range(len(items))]
