"""Weights that wait on disk until they are needed: nobody sees a network without them, and nothing is read twice."""

from __future__ import annotations

import copy
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import russet
from russet.checkpoints import load
from russet.checkpoints.formats import tensor_source
from russet.errors import CorruptFile
from russet.residency import network as residency

FAST = {"num_inference_steps": 2, "output_type": "np", "seed": 1}
NETWORKS = ("unet", "vae", "text_encoder")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "own"))


def opened(folder: Path, **options: Any) -> Any:
    pipe = russet.DiffusionPipeline.from_pretrained(folder, safety_checker=None, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def waits(pipe: Any) -> set[str]:
    """The networks that have no memory."""
    return {name for name in NETWORKS if next(pipe.known(name).parameters()).is_meta}


def same_weights(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def halved(folder: Path) -> Path:
    for path in folder.rglob("*.safetensors"):
        state = load_file(path)
        save_file(
            {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
            path,
            {"format": "pt"},
        )
    return folder


def test_nothing_is_read_until_a_network_is_looked_at_and_then_all_is(folder: Path) -> None:
    pipe = opened(folder)
    assert waits(pipe) == set(NETWORKS)
    assert pipe.unet.conv_in.weight.shape == (32, 4, 3, 3)
    assert waits(pipe) == set()
    assert pipe.unet is pipe.known("unet")


@pytest.mark.parametrize(
    "look",
    [
        lambda pipe: pipe.vae,
        lambda pipe: pipe.components,
        lambda pipe: pipe.networks,
        lambda pipe: pipe.to("cpu"),
        lambda pipe: pipe("a horse", **FAST),
        lambda pipe: hasattr(pipe, "text_encoder"),
    ],
)
def test_whatever_needs_weights_has_them_read(look: Any, folder: Path) -> None:
    pipe = opened(folder)
    look(pipe)
    assert waits(pipe) == set()


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("look", [lambda pipe: pipe.unet, lambda pipe: pipe.to("cpu")], ids=["a look", "to()"])
def test_weights_that_are_not_finite_are_reported_before_anything_is_computed(
    look: Any, dtype: str | None, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["decoder.conv_out.bias"][1] = -torch.inf
    save_file(state, path, {"format": "pt"})
    pipe = opened(folder, torch_dtype=dtype)
    assert "NaN" not in caplog.text
    look(pipe)
    assert "vae: NaN or Inf in decoder.conv_out.bias;" in caplog.text


def test_a_network_that_made_some_of_its_weights_itself_is_read_like_the_others(folder: Path) -> None:
    """As the safety checker does, whose first parameter is computed and not left empty."""
    pipe = russet.DiffusionPipeline.from_pretrained(folder)
    assert same_weights(pipe.safety_checker, load.pipeline(folder).components["safety_checker"])
    assert opened(folder).to(torch.float16).unet.dtype == torch.float16


def test_what_a_pipeline_says_of_itself_needs_no_weights(folder: Path) -> None:
    pipe = opened(folder)
    said = pipe.dtype, pipe.device, repr(pipe), str(pipe.plan()), pipe.vae_scale_factor
    pipe.scheduler = russet.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.enable_attention_slicing()
    assert pipe.tokenizer is not None
    assert waits(pipe) == set(NETWORKS)
    pipe.disable_attention_slicing()
    assert said[0] == pipe.unet.dtype == torch.float32
    assert "float32" in said[3]


def test_the_precision_that_was_asked_for_is_told_before_anything_is_read(folder: Path) -> None:
    pipe = opened(folder, torch_dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    assert waits(pipe) == set(NETWORKS)
    assert pipe.unet.dtype == pipe.dtype


def test_half_precision_goes_to_half_precision_without_a_copy(folder: Path) -> None:
    pipe = opened(halved(folder)).to(torch.float16)
    for network in pipe.networks.values():
        values, sources = network.state_dict(), residency.of(network).source.sources
        offsets = {values[name].data_ptr() - source.offset for name, source in sources.items() if name in values}
        assert len(offsets) == 1


def test_a_network_that_is_exchanged_is_never_read(folder: Path, tiny: Any) -> None:
    pipe = opened(folder)
    before = pipe.known("vae")
    pipe.vae = tiny.vae
    pipe.text_encoder = None
    assert pipe.unet is not None
    assert pipe.vae is tiny.vae
    assert pipe.text_encoder is None
    assert next(before.parameters()).is_meta


def test_an_attribute_that_was_deleted_is_gone(folder: Path) -> None:
    pipe = opened(folder)
    del pipe.text_encoder
    with pytest.raises(AttributeError, match="no text_encoder"):
        _ = pipe.text_encoder
    with pytest.raises(AttributeError, match="no text_encoder"):
        del pipe.text_encoder


@pytest.mark.parametrize("first", [lambda pipe: None, lambda pipe: pipe.unet, lambda pipe: pipe("a horse", **FAST)])
def test_a_pipeline_can_be_saved_over_the_folder_that_it_came_from(first: Any, folder: Path, tiny: Any) -> None:
    expected = tiny("a horse", **FAST).images
    pipe = opened(folder)
    first(pipe)
    pipe.save_pretrained(folder)
    pipe.unet.to("meta")  # as offload may do; its weights are read again
    assert np.array_equal(pipe("a horse", **FAST).images, expected)
    again = opened(folder)
    assert np.array_equal(again("a horse", **FAST).images, expected)


def test_a_folder_may_go_before_its_weights_are_read(folder: Path, tiny: Any) -> None:
    pipe = opened(folder)
    shutil.rmtree(folder)
    assert same_weights(pipe.unet, tiny.unet)


def test_a_file_that_is_rewritten_before_it_is_read_is_refused(folder: Path) -> None:
    pipe = opened(folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    for look in (lambda: pipe.unet, lambda: pipe("a horse", **FAST), lambda: pipe.to("cpu")):
        with pytest.raises(CorruptFile, match="changed while"):
            look()


def test_what_is_written_to_a_weight_reaches_neither_the_file_nor_another_pipeline(folder: Path) -> None:
    one, other = opened(folder), opened(folder)
    with torch.no_grad():
        one.unet.conv_in.weight.zero_()
        one.unet.time_embedding.linear_1.weight.zero_()
    assert float(other.unet.conv_in.weight.abs().sum()) > 0
    assert float(opened(folder).unet.time_embedding.linear_1.weight.abs().sum()) > 0


def test_threads_that_look_at_the_same_time_see_whole_networks(folder: Path) -> None:
    pipe = opened(folder)
    start, seen = threading.Barrier(4), []

    def look(name: str) -> None:
        start.wait()
        seen.append(any(value.is_meta for value in getattr(pipe, name).parameters()))

    threads = [threading.Thread(target=look, args=(name,)) for name in ("unet", "vae", "text_encoder", "unet")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [False] * 4


def test_a_copy_of_a_pipeline_reads_for_itself(folder: Path, tiny: Any) -> None:
    pipe = opened(folder)
    other = copy.deepcopy(pipe)
    assert same_weights(other.unet, tiny.unet)
    assert waits(pipe) == set(NETWORKS)
    assert other.unet is not pipe.unet


def test_a_single_file_waits_too_and_is_saved_whole(folder: Path, tmp_path: Path, tiny: Any) -> None:
    opened(folder).save_single_file(tmp_path / "one.safetensors")
    options: dict[str, Any] = {"config": folder}
    pipe = russet.StableDiffusionPipeline.from_single_file(tmp_path / "one.safetensors", **options)
    assert waits(pipe) == set(NETWORKS)
    pipe.unet.to("meta")
    pipe.save_single_file(tmp_path / "one.safetensors")  # over the file that it came from
    again = russet.StableDiffusionPipeline.from_single_file(tmp_path / "one.safetensors", **options)
    assert same_weights(again.unet, tiny.unet)
    assert pipe._request().reloadable


def test_where_files_cannot_be_held_open_everything_is_read_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    monkeypatch.setattr(tensor_source, "KEEP_OPEN", False)
    pipe = opened(folder)
    assert waits(pipe) == set()
    shutil.rmtree(folder)
    assert same_weights(pipe.unet, tiny.unet)
