"""Weights in another precision than before: those of the file, and not what an earlier precision left of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from russet import StableDiffusionPipeline

NETWORKS = ("unet", "vae", "text_encoder")


def weights_of(pipe: Any) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for name in NETWORKS for key, value in getattr(pipe, name).state_dict().items()}


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_what_was_rounded_is_read_again_in_the_precision_that_is_asked_for(
    half: torch.dtype, tiny_folder: Path
) -> None:
    expected = weights_of(StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=half)
    assert pipe.unet.dtype == half
    pipe.to(torch.float32)
    assert pipe.unet.dtype == torch.float32
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(pipe).items())


def test_what_the_user_has_changed_is_kept(tiny_folder: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    changed = pipe.unet.conv_in.weight.clone()
    pipe.to(torch.float32)
    assert torch.equal(pipe.unet.conv_in.weight, changed.float())
