"""CLIP's image processor: pictures to the pixels that CLIP's vision tower was trained on.

Resize the shorter edge with a bicubic filter, crop the centre, scale to 0..1, then subtract the mean and divide by the
standard deviation of CLIP's training set (Radford et al. 2021, arXiv:2103.00020; github.com/openai/CLIP).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from russet.component import Component
from russet.config import Config
from russet.errors import ArgumentTypeError, InputError
from russet.file_io import read_json, write_json

if TYPE_CHECKING:
    from PIL import Image

FILE = "preprocessor_config.json"
SIZES = ({"shortest_edge"}, {"height", "width"})


@dataclass(frozen=True, kw_only=True)
class CLIPImageProcessorConfig(Config):
    """preprocessor_config.json. ``size`` and ``crop_size`` are objects, or in older files ints: the shorter edge, and
    the side of a square. ``resample`` is Pillow's number of the filter; 3 is bicubic.
    """

    do_resize: bool = True
    size: int | Mapping[str, int] = field(default_factory=lambda: {"shortest_edge": 224}, hash=False)
    resample: int = 3
    do_center_crop: bool = True
    crop_size: int | Mapping[str, int] = field(default_factory=lambda: {"height": 224, "width": 224}, hash=False)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def check(self) -> None:
        for name, kinds in (("size", SIZES), ("crop_size", SIZES[1:])):
            value = self[name]
            edges = value if isinstance(value, Mapping) else {min(kinds[0]): value}
            self.require(
                set(edges) in kinds or isinstance(value, int), f"{name} must be {spelled(kinds)}, not {value!r}"
            )
            positive = all(type(edge) is int and edge > 0 for edge in edges.values())
            self.require(positive, f"{name} must be of positive whole numbers, not {value!r}")
        self.require(self.resample in range(6), f"resample must be one of Pillow's filters 0 to 5, not {self.resample}")
        for name in ("image_mean", "image_std"):
            self.require(len(self[name]) == 3, f"{name} must have three numbers, not {self[name]!r}")
        self.require(all(self.image_std), f"image_std must not be zero: {self.image_std!r}")

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """The width and height in pixels to which a picture is resized."""
        if isinstance(self.size, Mapping) and "width" in self.size:
            return self.size["width"], self.size["height"]
        edge = self.size if isinstance(self.size, int) else self.size["shortest_edge"]
        if width <= height:
            return edge, int(edge * height / width)
        return int(edge * width / height), edge

    def cropped(self) -> tuple[int, int]:
        """The width and height in pixels to which a picture is cropped."""
        if isinstance(self.crop_size, int):
            return self.crop_size, self.crop_size
        return self.crop_size["width"], self.crop_size["height"]


class Pixels(NamedTuple):
    """What a vision tower reads: ``pixel_values`` [B, 3, H, W] float32, about -2..2."""

    pixel_values: torch.Tensor


class CLIPImageProcessor(Component):
    """Pictures to the input of CLIP's vision tower, equal to transformers' CLIPImageProcessor on Pillow images.

    Raises:
        ConfigError: the config has a value that makes no sense.
    """

    config_class = CLIPImageProcessorConfig
    config: CLIPImageProcessorConfig

    def __init__(self, config: Mapping[str, Any] | None = None, **changes: Any) -> None:
        self.config = CLIPImageProcessorConfig.of(config, changes)

    @classmethod
    def from_files(cls, folder: Path) -> CLIPImageProcessor:
        """Reads preprocessor_config.json in a folder.

        Raises:
            MissingFile, CorruptFile, ConfigError: it is absent, damaged, or makes no sense.
        """
        path = folder / FILE
        return cls(CLIPImageProcessorConfig.from_dict(read_json(path), str(path)))

    def save(self, folder: Path) -> None:
        """Writes preprocessor_config.json into a folder.

        Raises:
            CheckpointError: it cannot be written.
        """
        write_json(folder / FILE, {**self.config.to_dict(), "image_processor_type": "CLIPImageProcessor"})

    def __call__(self, images: Image.Image | Sequence[Image.Image], *, return_tensors: Literal["pt"] = "pt") -> Pixels:
        """Prepares pictures of any size and mode.

        Raises:
            ArgumentTypeError: one is no Pillow image.
            InputError: without a crop they come out in different sizes, or ``return_tensors`` is not "pt".
        """
        if return_tensors != "pt":
            raise InputError(f'return_tensors can only be "pt", not {return_tensors!r}')
        from PIL import Image

        batch = [images] if isinstance(images, Image.Image) else list(images)
        rows = [self._prepared(image) for image in batch]
        if len({row.shape for row in rows}) > 1:
            raise InputError("the pictures come out in different sizes; set do_center_crop, or pass them one by one")
        return Pixels(torch.stack(rows) if rows else torch.empty(0, 3, *reversed(self.config.cropped()), device="cpu"))

    def _prepared(self, image: Image.Image) -> torch.Tensor:
        """One picture as [3, H, W] float32."""
        from PIL import Image

        if not isinstance(image, Image.Image):
            raise ArgumentTypeError(f"a picture must be a Pillow image, not {type(image).__name__}")
        config, image = self.config, opaque(image)
        if config.do_resize:
            image = image.resize(config.resized(*image.size), Image.Resampling(config.resample))
        if config.do_center_crop:
            width, height = config.cropped()
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # what lies outside the picture is black
        pixels = np.asarray(image, dtype=np.float32)
        if config.do_rescale:
            pixels = pixels * np.float32(config.rescale_factor)
        if config.do_normalize:
            mean, std = (np.array(values, dtype=np.float32) for values in (config.image_mean, config.image_std))
            pixels = (pixels - mean) / std
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def opaque(image: Image.Image) -> Image.Image:
    """The picture as RGB; what is transparent shows white."""
    from PIL import Image

    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def spelled(kinds: Sequence[set[str]]) -> str:
    return " or ".join("{" + ", ".join(sorted(kind)) + "}" for kind in kinds) + ", or an int"
