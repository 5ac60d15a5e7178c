"""Pipelines and components that are pickled and copied draw the same picture."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import russet

FAST = {"num_inference_steps": 2, "output_type": "np", "seed": 1}
READ = ["not read yet", "looked at", "drawn with"]


def opened(folder: Path, read: str = READ[0]) -> Any:
    pipe = russet.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if read == READ[1]:
        assert pipe.unet is not None
    if read == READ[2]:
        pipe("a horse", **FAST)
    return pipe


@pytest.mark.parametrize("read", READ)
def test_a_pickled_pipeline_draws_the_same_picture_and_so_does_the_first(read: str, tiny_folder: Path) -> None:
    expected = opened(tiny_folder)("a horse", **FAST).images
    pipe = opened(tiny_folder, read)
    again = pickle.loads(pickle.dumps(pipe))
    for one in (again, pipe):
        assert np.array_equal(one("a horse", **FAST).images, expected)


@pytest.mark.parametrize("read", READ)
def test_a_copied_pipeline_draws_the_same_picture_and_so_does_the_first(read: str, tiny_folder: Path) -> None:
    expected = opened(tiny_folder)("a horse", **FAST).images
    pipe = opened(tiny_folder, read)
    again = copy.deepcopy(pipe)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    assert np.array_equal(again("a horse", **FAST).images, expected)
    assert not np.array_equal(pipe("a horse", **FAST).images, expected)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker"])
def test_a_component_is_pickled_and_copied(name: str, tiny_folder: Path) -> None:
    pipe = opened(tiny_folder)
    expected = pipe("a horse", **FAST).images
    for made in (pickle.loads(pickle.dumps(getattr(pipe, name))), copy.deepcopy(getattr(pipe, name))):
        setattr(pipe, name, made)
        assert np.array_equal(pipe("a horse", **FAST).images, expected)
