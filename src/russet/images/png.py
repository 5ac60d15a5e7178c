"""PNG files that are complete or not there at all, with a text inside that says how the image was made.

That text is the ``parameters`` chunk of AUTOMATIC1111's web UI:

    a cat on the moon
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, CFG scale: 7.0, Seed: 42, Size: 512x512, Model: v1-5, Version: Russet 0.1.0

The prompt, which may have several lines; the negative prompt, if there is one; then pairs on one line, with values that
hold a comma, a colon or a line break quoted as in JSON.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from russet.errors import InputError, OutputError
from russet.file_io import aside

if TYPE_CHECKING:
    from PIL import Image

KEY = "parameters"
NEGATIVE = "Negative prompt: "
PAIR = re.compile(r'\s*(?P<name>\w[\w \-/]{0,60}):\s*(?P<value>"(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
FEWEST = 3
"""A last line with fewer pairs than this is taken as a part of the prompt, as the web UI does."""


@dataclass(frozen=True)
class Parameters:
    """How an image was made. ``settings`` are the pairs of the last line, in their order."""

    prompt: str
    negative_prompt: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    def to_text(self) -> str:
        """The text of the chunk."""
        quoted = {
            name: json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value
            for name, value in self.settings.items()
        }
        negative = [NEGATIVE + self.negative_prompt] if self.negative_prompt else []
        return "\n".join([self.prompt, *negative, ", ".join(f"{name}: {value}" for name, value in quoted.items())])

    @classmethod
    def of_text(cls, text: str) -> Parameters:
        """Reads the text of a chunk, whoever wrote it; what it does not say is empty."""
        lines = text.strip().split("\n")
        settings = {match["name"]: unquoted(match["value"]) for match in PAIR.finditer(lines[-1])}
        if len(settings) < FEWEST:
            settings = {}
        else:
            lines.pop()
        begin = next((number for number, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
        negative = "\n".join(lines[begin:]).removeprefix(NEGATIVE)
        return cls("\n".join(lines[:begin]), negative, settings)


def unquoted(value: str) -> str:
    if len(value) < 2 or not value.startswith('"'):
        return value.strip()
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def save_new(
    image: Image.Image, folder: Path, stem: str, text: Mapping[str, str] | None = None, *, tail: str = ""
) -> Path:
    """Writes an image as the next free ``stem-0001tail.png`` in ``folder``, which is made if need be.

    ``text`` goes into the file as PNG text chunks. No file is ever overwritten, and none is left incomplete.

    Raises:
        OutputError: the folder cannot be made, or the file cannot be written.
    """
    taken = re.compile(re.escape(stem) + r"-(\d{4,})")
    entries = os.listdir(folder) if folder.is_dir() else []
    last = max((int(match[1]) for name in entries if (match := taken.match(name))), default=0)
    paths = (folder / f"{stem}-{number:04d}{tail}.png" for number in itertools.count(last + 1))
    return write_first_free(encode_png(image, text or {}), paths)


def save_as(image: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> Path:
    """Writes an image as ``path``, or where that is taken as the first free ``name-0002.png`` beside it.

    Raises:
        InputError: the name does not end in .png.
        OutputError: the file cannot be written.
    """
    check_name(path)
    numbered = (path.with_name(f"{path.stem}-{number:04d}{path.suffix}") for number in itertools.count(2))
    return write_first_free(encode_png(image, text or {}), itertools.chain([path], numbered))


def save_over(image: Image.Image, path: Path) -> None:
    """Writes an image as ``path``, replacing what is there: a reader finds the old file or the new one, complete.

    Raises:
        InputError: the name does not end in .png.
        OutputError: the file cannot be written.
    """
    check_name(path)
    part = aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(encode_png(image, {}))
        part.replace(path)
    except OSError as error:
        raise OutputError(f"no image can be written to {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def check_name(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise InputError(f"an image's name must end in .png: {path}")


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size as one image, in a row."""
    from PIL import Image

    width, height = images[0].size
    row = Image.new("RGB", (width * len(images), height))
    for column, image in enumerate(images):
        row.paste(image, (column * width, 0))
    return row


def encode_png(image: Image.Image, text: Mapping[str, str]) -> bytes:
    """The bytes of a PNG file with text chunks: tEXt for Latin-1, else iTXt."""
    from PIL.PngImagePlugin import PngInfo

    chunks, buffer = PngInfo(), io.BytesIO()
    for key, value in text.items():
        chunks.add_text(key, value)
    # Pillow keeps the options of a save on the image itself, so two threads would mix them up; hence the copy.
    image.copy().save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def write_first_free(data: bytes, paths: Iterable[Path]) -> Path:
    """Writes ``data`` to the first of ``paths``, all in one folder, that does not exist; completely, or not at all.

    Raises:
        OutputError: the folder cannot be made, or the file cannot be written.
    """
    candidates = iter(paths)
    path = next(candidates)
    part = aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        while not renamed(part, path):
            path = next(candidates)
    except OSError as error:
        raise OutputError(f"no image can be written to {path.parent}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)
    return path


def renamed(part: Path, path: Path) -> bool:
    """Names the file ``part`` ``path``; False where a file has that name, even if it appeared just now."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: reserve the name with an empty file, then replace that
        return renamed_without_links(part, path)
    return True


def renamed_without_links(part: Path, path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    try:
        os.replace(part, path)
    except BaseException:
        os.unlink(path)
        raise
    return True
