"""Pictures: Pillow images to and from tensors, and PNG files that are new and whole or not there at all.

Inside Russet a picture is [B, 3, H, W] in -1..1, as the VAE has it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from russet.errors import ArgumentTypeError, InputError, OutputError
from russet.file_io import aside


def from_pil(images: Image.Image | Sequence[Image.Image]) -> torch.Tensor:
    """Pillow images of one size as [B, 3, H, W] float32 in -1..1; transparency and palettes become plain RGB.

    Raises:
        ArgumentTypeError: one is no Pillow image.
        InputError: there is none, or their sizes differ.
    """
    batch = [images] if isinstance(images, Image.Image) else list(images)
    for image in batch:
        if not isinstance(image, Image.Image):
            raise ArgumentTypeError(f"a picture must be a Pillow image, not {type(image).__name__}")
    if len(sizes := {image.size for image in batch}) != 1:
        raise InputError(f"the pictures must be of one size, not {sorted(sizes) or 'none at all'}")
    pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in batch])
    return torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def to_unit(x: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] in -1..1 as float32 in 0..1, on the CPU; what lies outside is clamped."""
    return _unit(x).cpu()


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """[B, 3, H, W] in -1..1 as an array [B, H, W, 3], float32 in 0..1."""
    return to_unit(x).permute(0, 2, 3, 1).numpy()


def to_pil(x: torch.Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in -1..1 as Pillow images, each value rounded to the nearest of 256."""
    rows = (_unit(x) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return [Image.fromarray(row) for row in rows.cpu().numpy()]


def _unit(x: torch.Tensor) -> torch.Tensor:
    """``to_unit`` where it is quickest: on a GPU, whose pictures are a quarter as large once they are bytes; a Mac's
    memory is one.
    """
    x = x.detach() if x.is_cuda else x.detach().cpu()
    return (x.float() / 2 + 0.5).clamp(0, 1)


def as_output(x: torch.Tensor, output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
    """[B, 3, H, W] in -1..1 as what a pipeline was asked for: "pil", "np" or "pt", the latter two in 0..1.

    Raises:
        InputError: another output type.
    """
    forms: dict[str, Callable[[torch.Tensor], Any]] = {"pil": to_pil, "np": to_numpy, "pt": to_unit}
    if output_type not in forms:
        raise InputError(f"output_type must be pil, np or pt, not {output_type!r}")
    output: list[Image.Image] | np.ndarray | torch.Tensor = forms[output_type](x)
    return output


def save_new(
    image: Image.Image, folder: Path, stem: str, text: Mapping[str, str] | None = None, *, tail: str = ""
) -> Path:
    """Writes a picture as the next free ``stem-0001tail.png`` in ``folder``, which is made if need be.

    ``text`` goes into the file as PNG text chunks. No file is ever overwritten, and none is left behind half written.

    Raises:
        OutputError: the folder cannot be made, or the file cannot be written.
    """
    taken = re.compile(re.escape(stem) + r"-(\d{4,})")
    entries = os.listdir(folder) if folder.is_dir() else []
    last = max((int(match[1]) for name in entries if (match := taken.match(name))), default=0)
    names = (folder / f"{stem}-{number:04d}{tail}.png" for number in itertools.count(last + 1))
    return write_first_free(encode_png(image, text or {}), names)


def save_as(image: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> Path:
    """Writes a picture as ``path``, or where that is taken as the first free ``name-0002.png`` beside it.

    Raises:
        InputError: the name does not end in .png.
        OutputError: the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"a picture's name must end in .png: {path}")
    numbered = (path.with_name(f"{path.stem}-{number:04d}{path.suffix}") for number in itertools.count(2))
    return write_first_free(encode_png(image, text or {}), itertools.chain([path], numbered))


def save_over(image: Image.Image, path: Path) -> None:
    """Writes a picture as ``path``, in place of one that is there: a reader finds the old one or the new one, whole.

    Raises:
        InputError: the name does not end in .png.
        OutputError: the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"a picture's name must end in .png: {path}")
    part = aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(encode_png(image, {}))
        part.replace(path)
    except OSError as error:
        raise OutputError(f"no picture can be written to {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size as one, in a row."""
    width, height = images[0].size
    row = Image.new("RGB", (width * len(images), height))
    for place, image in enumerate(images):
        row.paste(image, (place * width, 0))
    return row


def encode_png(image: Image.Image, text: Mapping[str, str]) -> bytes:
    """A PNG file's bytes, with text chunks: tEXt where Latin-1 can say it, else iTXt."""
    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)
    buffer = io.BytesIO()
    # Pillow keeps the options of a save on the image itself, so two threads would mix them up; hence the copy.
    image.copy().save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def write_first_free(data: bytes, paths: Iterable[Path]) -> Path:
    """Writes ``data`` under the first of ``paths``, all in one folder, that no file has; whole, or not at all.

    Raises:
        OutputError: the folder cannot be made, or the file cannot be written.
    """
    candidates = iter(paths)
    path = next(candidates)
    part = aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        while not claimed(part, path):
            path = next(candidates)
    except OSError as error:
        raise OutputError(f"no picture can be written to {path.parent}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)
    return path


def claimed(part: Path, path: Path) -> bool:
    """Gives the file ``part`` the name ``path``, unless a file has that name."""
    try:
        os.link(part, path)  # fails where the name is taken, whoever took it and however short ago
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: take the name with an empty file, then move over it
        return claimed_by_rename(part, path)
    return True


def claimed_by_rename(part: Path, path: Path) -> bool:
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
