"""What a pipeline call gives back."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from russet.planning.plan import Plan

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, repr=False)
class StableDiffusionPipelineOutput:
    """The pictures of one call, and how they were made.

    images: a list of PIL images, or an array [B, H, W, 3] in 0..1, or a tensor [B, 3, H, W] in 0..1, or latents
        [B, C, h, w], as ``output_type`` asked.
    nsfw_content_detected: one bool per image; None where no safety checker looked.
    seeds: the seed of each image, where the call had seeds.
    times: seconds per phase: "text", "denoise", "decode".
    plan: every decision that was made for this call, with its reason.
    notes: what went otherwise than planned, in words; usually empty.

    ``output[0]`` is the images and ``output[1]`` the flags, as with Diffusers; ``output["images"]`` works too.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None
    seeds: tuple[int, ...] | None = None
    times: Mapping[str, float] = field(default_factory=dict)
    plan: Plan | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shape = getattr(self.images, "shape", None)
        what = f"{len(self.images)} images" if shape is None else f"{type(self.images).__name__} {list(shape)}"
        seeds = f", seeds {', '.join(map(str, self.seeds))}" if self.seeds else ""
        notes = f", {len(self.notes)} notes" if self.notes else ""
        return f"<{type(self).__name__}: {what}{seeds}{notes}>"

    def _repr_html_(self) -> str | None:
        """The images for a notebook; None where they are arrays."""
        images = self._pictures()
        if not images:
            return None
        encoded = (base64.b64encode(png(image)).decode() for image in images)
        return "".join(f'<img src="data:image/png;base64,{data}">' for data in encoded)

    def _repr_png_(self) -> bytes | None:
        """The first image for a notebook that shows no HTML; None where they are arrays."""
        images = self._pictures()
        return png(images[0]) if images else None

    def _pictures(self) -> list[Image.Image]:
        from PIL import Image

        listed = self.images if isinstance(self.images, list) else []
        return [image for image in listed if isinstance(image, Image.Image)]

    def to_tuple(self) -> tuple[Any, ...]:
        return self.images, self.nsfw_content_detected

    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())


class StableDiffusionXLPipelineOutput(StableDiffusionPipelineOutput):
    """The same of Stable Diffusion XL, which has no safety checker: as a tuple it is the images alone."""

    def to_tuple(self) -> tuple[Any, ...]:
        return (self.images,)


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
