"""Several files written as one: aside first, then all moved into place, and moved back if that is interrupted."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from russet.errors import CheckpointError, RussetError


@contextlib.contextmanager
def atomic_directory(folder: Path, nbytes: int) -> Iterator[Path]:
    """A folder to write into; when the block ends, its files replace those of the same names in ``folder``.

    If anything fails, Ctrl-C included, ``folder`` is as it was before.

    Args:
        nbytes: about how much will be written, so that a disk without room is reported before and not after.

    Raises:
        CheckpointError: it cannot be written.
    """
    existed = folder.is_dir()
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < nbytes:
            raise CheckpointError(f"{folder} needs {nbytes / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left")
        temporary = Path(tempfile.mkdtemp(prefix=".russet-", suffix=".part", dir=folder))
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        _move(new, old, folder)
    except RussetError:
        raise
    except FileExistsError:
        raise CheckpointError(f"{folder} is a file; a folder is needed to save into") from None
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise CheckpointError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty: nothing was moved into it


def _move(new: Path, old: Path, folder: Path) -> None:
    """Moves every file below ``new`` to its place in ``folder``; what was there waits in ``old`` until all is done."""
    names = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    made = [path for path in sorted({folder / name.parent for name in names}) if not path.exists()]
    moved: list[Path] = []
    try:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (old / name).parent.mkdir(parents=True, exist_ok=True)
        for name in names:
            moved.append(name)
            if (folder / name).exists():
                os.replace(folder / name, old / name)
            os.replace(new / name, folder / name)
    except BaseException:
        for name in moved:
            if (old / name).exists():
                os.replace(old / name, folder / name)
            elif not (new / name).exists():
                (folder / name).unlink()
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
