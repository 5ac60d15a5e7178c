"""Calls that run at once, or one inside another: each gets to the bit the picture that it gets alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import russet

FAST: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}


def nothing(pipe: Any, index: int, t: Any, tensors: Any) -> None:
    pass


def at_once(*work: Callable[[], Any]) -> list[Any]:
    """The results of functions that run in threads of their own, which begin together."""
    begin, found = threading.Barrier(len(work)), [None] * len(work)

    def run(place: int) -> None:
        begin.wait()
        try:
            found[place] = work[place]()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


def own(folder: Path, **given: Any) -> Any:
    pipe = russet.DiffusionPipeline.from_pretrained(folder, safety_checker=None, **given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_at_once(pipe: Any, count: int, **given: Any) -> None:
    calls = [{**FAST, **given, "seed": i, "guidance_scale": 1.5 + 4 * i} for i in range(count)]
    alone = [pipe("a horse", **call).images for call in calls]
    for _ in range(3):
        together = at_once(*(lambda call=call: pipe("a horse", **call).images for call in calls))
        assert [bool(np.array_equal(a, b)) for a, b in zip(alone, together, strict=True)] == [True] * count


@pytest.mark.parametrize("count", [2, 4])
def test_threads_draw_their_own_pictures(count: int, tiny_folder: Path) -> None:
    check_at_once(own(tiny_folder), count)


@pytest.mark.parametrize("count", [2, 4])
def test_threads_with_callbacks_keep_their_guidance(count: int, tiny_folder: Path) -> None:
    check_at_once(own(tiny_folder), count, callback_on_step_end=nothing)


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_four_threads_draw_their_own_pictures_under_offload(mode: str, tiny_folder: Path) -> None:
    pipe = own(tiny_folder)
    getattr(pipe, f"enable_{mode}_cpu_offload")(device="cpu")
    check_at_once(pipe, 4)


def large_text(folder: Path) -> Path:
    """The tiny pipeline with a text encoder so large that the plan drops it after encoding on a CPU."""
    text = russet.CLIPTextModel.from_pretrained(folder / "text_encoder")
    config = {**text.config.to_dict(), "intermediate_size": 2**15, "num_hidden_layers": 17}
    made = russet.CLIPTextModel.from_config(config)
    pipe = own(folder, text_encoder=made)
    pipe.save_pretrained(folder.parent / "large")
    return folder.parent / "large"


def test_two_threads_with_a_text_encoder_of_stable_diffusions_size_draw_their_own_pictures(tiny_folder: Path) -> None:
    check_at_once(own(large_text(tiny_folder)), 2)


def test_a_callback_that_draws_with_the_same_pipe_spoils_nothing(tiny_folder: Path) -> None:
    pipe, inner = own(tiny_folder), []
    alone = [pipe("a horse", seed=1, **FAST).images, pipe("a boat", seed=2, guidance_scale=1.0, **FAST).images]

    def draw(pipe: Any, index: int, t: Any, tensors: Any) -> None:
        inner.append(pipe("a boat", seed=2, guidance_scale=1.0, **FAST).images)

    outer = pipe("a horse", seed=1, callback_on_step_end=draw, **FAST).images
    assert all(np.array_equal(one, alone[1]) for one in inner)
    assert np.array_equal(outer, alone[0])


@pytest.mark.parametrize("mode", [pytest.param("model"), pytest.param("sequential")])
def test_a_callback_that_draws_under_offload_spoils_nothing(mode: str, tiny_folder: Path) -> None:
    pipe = own(tiny_folder)
    getattr(pipe, f"enable_{mode}_cpu_offload")(device="cpu")
    alone = pipe("a horse", seed=1, **FAST).images

    def draw(pipe: Any, index: int, t: Any, tensors: Any) -> None:
        pipe("a boat", seed=2, guidance_scale=1.0, **FAST)

    assert np.array_equal(pipe("a horse", seed=1, callback_on_step_end=draw, **FAST).images, alone)


def test_one_call_after_another_leaves_nothing_behind(tiny_folder: Path) -> None:
    pipe = own(tiny_folder)
    first = pipe("a horse", seed=1, **FAST).images
    pipe("a boat", seed=2, guidance_scale=3.0, callback_on_step_end=nothing, **FAST)
    assert np.array_equal(pipe("a horse", seed=1, **FAST).images, first)


def test_tiling_is_off_again_after_threads(tiny_folder: Path) -> None:
    pipe = own(tiny_folder)
    before = pipe.vae.tiling
    pipe.enable_vae_tiling()
    for _ in range(6):
        at_once(*(lambda i=i: pipe("a horse", seed=i, **{**FAST, "num_inference_steps": 1 + i}) for i in range(4)))
    pipe.disable_vae_tiling()
    assert pipe.vae.tiling == before


def stopped(pipe: Any, when: int, flag: str = "interrupt") -> tuple[int, Any]:
    """Draws with a callback that stops at a step; how many steps were made."""
    seen: list[int] = []

    def stop(pipe: Any, index: int, t: Any, tensors: Any) -> None:
        seen.append(index)
        if index == when:
            setattr(pipe, flag, True)

    images = pipe("a horse", seed=1, callback_on_step_end=stop, **{**FAST, "num_inference_steps": 6}).images
    return len(seen), images


@pytest.mark.parametrize("flag", ["interrupt", "_interrupt"])
def test_a_callback_ends_its_call_and_no_later_one(flag: str, tiny_folder: Path) -> None:
    pipe = own(tiny_folder)
    whole, _ = stopped(pipe, 99)
    assert stopped(pipe, 1, flag)[0] == 2
    assert stopped(pipe, 99)[0] == whole


def test_the_end_of_one_call_is_not_that_of_another(tiny_folder: Path) -> None:
    pipe = own(tiny_folder)
    expected = stopped(pipe, 99)[1]
    in_the_middle, ended, steps = threading.Event(), threading.Event(), []

    def wait(pipe: Any, index: int, t: Any, tensors: Any) -> None:
        steps.append(index)
        if index == 1:
            in_the_middle.set()
            ended.wait(10)

    def end() -> None:
        in_the_middle.wait(10)
        stopped(pipe, 0)
        pipe.interrupt = pipe.interrupt  # whatever the other call has left
        ended.set()

    calls = {**FAST, "num_inference_steps": 6}
    found, _ = at_once(lambda: pipe("a horse", seed=1, callback_on_step_end=wait, **calls).images, end)
    assert np.array_equal(found, expected)


def test_a_stop_that_comes_while_text_is_encoded_is_obeyed(tiny_folder: Path) -> None:
    pipe, steps = own(tiny_folder), []

    def stop(encoder: Any, args: Any) -> None:
        pipe.interrupt = True

    hook = pipe.text_encoder.register_forward_pre_hook(stop)
    pipe("a horse", seed=1, callback_on_step_end=lambda pipe, index, t, tensors: steps.append(index), **FAST)
    hook.remove()
    assert len(steps) <= 1


def test_threads_share_torchs_settings_without_changing_them(tiny_folder: Path) -> None:
    pipe, before = own(tiny_folder), (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    at_once(*(lambda i=i: pipe("a horse", seed=i, **FAST) for i in range(3)))
    assert (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()) == before
