"""What a pipeline call gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from russet.planning.plan import Plan


@dataclass(frozen=True)
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
