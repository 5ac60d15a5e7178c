"""A function in the safety checker's place, as Diffusers' users give one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import russet
from russet.errors import ArgumentTypeError, InputError

FAST = {"num_inference_steps": 2, "output_type": "np", "seed": 1}
HARMLESS = {
    "a list of flags": lambda images, clip_input: (images, [False] * len(images)),
    "one flag": lambda images, **others: (images, False),
    "no flag": lambda images, clip_input=None: (images, None),
}


@pytest.fixture
def own(tiny_folder: Path) -> Any:
    """The tiny pipeline with its safety checker's feature extractor and a UNet of its own."""
    pipe = russet.DiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("function", HARMLESS.values(), ids=HARMLESS)
def test_a_function_that_is_assigned_is_called_and_changes_nothing(function: Any, own: Any) -> None:
    expected = own("a horse", **FAST).images
    own.safety_checker = function
    output = own("a horse", **FAST)
    assert np.array_equal(output.images, expected)
    assert output.nsfw_content_detected in ([False], None)


def test_a_function_is_taken_by_from_pretrained_and_by_the_class(tiny_folder: Path) -> None:
    function = HARMLESS["a list of flags"]
    pipe = russet.DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=function)
    assert pipe.safety_checker is function
    again = type(pipe)(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert again("a horse", **FAST).nsfw_content_detected == [False]
    assert "safety_checker: function" in repr(again)


def test_the_function_sees_what_diffusers_shows_it_and_what_it_flags_is_black(own: Any) -> None:
    seen: dict[str, Any] = {}

    def function(images: Any, clip_input: Any) -> Any:
        seen.update(images=images, clip_input=clip_input)
        return images.clamp(-1, 1) / 2, [index == 1 for index in range(len(images))]

    expected = own(["a horse", "a boat"], **FAST).images
    own.safety_checker = function
    output = own(["a horse", "a boat"], **FAST)
    assert output.nsfw_content_detected == [False, True]
    assert seen["images"].shape == (2, 3, 64, 64)
    assert float(seen["images"].min()) < 0  # from -1 to 1
    assert seen["clip_input"].shape == (2, 3, 32, 32)
    assert output.images[1].max() == 0
    assert np.abs(output.images[0] - (expected[0] / 2 + 0.25)).max() < 1e-6


def test_without_a_feature_extractor_the_function_gets_the_pictures_alone(tiny: Any) -> None:
    tiny.feature_extractor = None
    tiny.safety_checker = lambda images, clip_input: (images, [clip_input is None])
    assert tiny("a horse", **FAST).nsfw_content_detected == [True]


@pytest.mark.parametrize("answer", [None, "ok", (1, [False]), (torch.zeros(1, 3, 8, 8), [False])], ids=str)
def test_an_answer_that_is_none_is_an_error(answer: Any, tiny: Any) -> None:
    tiny.safety_checker = lambda images, clip_input: answer
    with pytest.raises((InputError, ArgumentTypeError), match="safety_checker"):
        tiny("a horse", **FAST)


def test_flags_for_other_pictures_are_an_error(tiny: Any) -> None:
    tiny.safety_checker = lambda images, clip_input: (images, [False, False])
    with pytest.raises(InputError, match="2 flags for 1 pictures"):
        tiny("a horse", **FAST)


@pytest.mark.parametrize("wrong", ["a text", 3, torch.nn.Linear(1, 1), dict], ids=["text", "number", "module", "class"])
def test_what_is_neither_a_checker_nor_a_function_is_refused(wrong: Any, tiny: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="safety_checker"):
        type(tiny)(**{**tiny.components, "safety_checker": wrong})


def test_a_pipeline_with_a_function_moves_offloads_and_is_saved_without_it(
    own: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = own("a horse", **FAST).images
    own.safety_checker = HARMLESS["a list of flags"]
    own.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(own("a horse", **FAST).images, expected)
    own.save_pretrained(tmp_path / "saved")
    assert "safety_checker is a function" in caplog.text
    assert russet.DiffusionPipeline.from_pretrained(tmp_path / "saved").safety_checker is None
