"""A network that pipelines, runs, threads and users share: in form while a run is open, and a plain one otherwise."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import russet
from russet.backends.layers import ComposedGroupNorm
from russet.models.unet import UNet2DConditionModel
from russet.planning.plan import Plan
from russet.residency import network as residency

from ..families import replanned

FAST = {"num_inference_steps": 2, "output_type": "np", "seed": 1}
Z = torch.zeros(1, 4, 8, 8)


def opened(folder: Path) -> Any:
    pipe = russet.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def own(tiny_folder: Path) -> Any:
    return opened(tiny_folder)


@pytest.fixture
def dropping(own: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pipeline with a plan that drops the weights of all networks while they do not work."""
    decide = own.plan
    monkeypatch.setattr(own, "plan", lambda **sizes: replanned(decide(**sizes), offload="model", offload_target="disk"))
    return own


def loaded(pipe: Any) -> set[str]:
    return {name for name, network in pipe._networks().items() if residency.of(network).in_memory}


def special(pipe: Any) -> Plan:
    """A plan whose form shows in the classes of modules."""
    return replanned(pipe.plan(), group_norm="composed")


def composed(network: nn.Module) -> bool:
    return any(type(module) is ComposedGroupNorm for module in network.modules())


USES = {
    "decode": lambda pipe, held: held["vae"].decode(Z),
    "call": lambda pipe, held: held["text_encoder"](torch.zeros(1, 77, dtype=torch.long)),
    "state_dict": lambda pipe, held: held["unet"].state_dict()["conv_in.weight"].sum().item(),
    "parameters": lambda pipe, held: next(held["unet"].parameters()).sum().item(),
    "a module": lambda pipe, held: held["conv"](Z),
    "a module's weight": lambda pipe, held: held["conv"].weight.sum().item(),
    "deepcopy": lambda pipe, held: copy.deepcopy(held["unet"])(Z, 1, torch.zeros(1, 77, 32)),
    "pickle": lambda pipe, held: pickle.loads(pickle.dumps(held["unet"]))(Z, 1, torch.zeros(1, 77, 32)),
    "the attribute": lambda pipe, held: pipe.vae.decode(Z),
    "half precision": lambda pipe, held: held["vae"].double().decode(Z.double()),
}


@pytest.mark.parametrize("use", USES)
def test_dropped_weights_are_there_for_whoever_uses_the_network(use: str, dropping: Any) -> None:
    held = {**dropping.networks, "conv": dropping.unet.conv_in}
    dropping("a horse", **FAST)
    assert loaded(dropping) == set()
    USES[use](dropping, held)
    assert type(dropping.unet) is UNet2DConditionModel or "unet" not in loaded(dropping)


def test_a_second_pipeline_draws_and_saves_with_networks_that_another_has_dropped(
    dropping: Any, tmp_path: Path
) -> None:
    expected = dropping("a horse", **FAST).images
    other = type(dropping)(**dropping.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    dropping("a horse", **FAST)
    assert loaded(dropping) == set()
    other.save_pretrained(tmp_path / "saved")
    assert np.array_equal(other("a horse", **FAST).images, expected)
    assert np.array_equal(opened(tmp_path / "saved")("a horse", **FAST).images, expected)
    assert np.array_equal(dropping("a horse", **FAST).images, expected)


def test_a_parameter_that_somebody_holds_stays_the_networks(dropping: Any) -> None:
    before = dropping("a horse", **FAST).images
    weight = dropping.unet.conv_in.weight
    dropping("a horse", **FAST)
    weight.data.mul_(1.3)
    assert not np.array_equal(dropping("a horse", **FAST).images, before)
    assert dropping.unet.conv_in.weight is weight


def test_a_module_that_is_put_into_a_network_without_weights_stays(dropping: Any) -> None:
    before = dropping("a horse", **FAST).images
    unet = dropping.unet
    unet.conv_in = copy.deepcopy(unet.conv_in)
    with torch.no_grad():
        unet.conv_in.weight.mul_(1.3)
    after = dropping("a horse", **FAST).images
    assert not np.array_equal(after, before)
    assert np.array_equal(dropping("a horse", **FAST).images, after)


@pytest.mark.parametrize("how", ["closed", "left", "failed", "forgotten"])
def test_a_network_is_plain_again_when_the_last_run_ends(how: str, own: Any) -> None:
    plan, unet = special(own), own.unet
    other = type(own)(**own.components, requires_safety_checker=False)
    outer, inner = other.run_open(), own.run_open()
    with own.on_device("unet", plan):
        assert composed(unet)
    assert composed(unet), "between two steps"
    inner.close()
    assert composed(unet), "another run is open"
    if how == "closed":
        outer.close()
    elif how == "left":
        with outer:
            pass
    elif how == "failed":
        with pytest.raises(KeyError), outer:
            raise KeyError
    del outer, inner
    gc.collect()
    assert not composed(unet)


def test_without_a_run_the_form_lasts_as_long_as_the_block(own: Any) -> None:
    with own.on_device("unet", special(own)):
        assert composed(own.unet)
        with own.on_device("unet", own.plan()):
            assert not composed(own.unet)
        assert composed(own.unet), "the outer block has its form again"
    assert not composed(own.unet)


def test_what_a_user_sets_during_a_run_is_not_undone(own: Any) -> None:
    class Mine(nn.GroupNorm):
        pass

    with own.run_open():
        with own.on_device("unet", special(own)):
            pass
        own.unet.conv_norm_out.__class__ = Mine
        own.vae.enable_tiling(32)
    assert type(own.unet.conv_norm_out) is Mine
    assert own.vae.tiling is not None


def test_tiles_of_a_plan_are_not_left_on_the_vae(own: Any) -> None:
    own.enable_vae_tiling()
    own("a horse", **FAST)
    assert own.vae.tiling is None


def test_more_precision_is_a_form_too(own: Any) -> None:
    own.to(torch.bfloat16)
    weight = own.unet.conv_in.weight.clone()
    plan = own.plan()
    with own.run_open():
        with own.on_device("unet", plan, "float32"):
            assert own.unet.dtype == torch.float32
        with own.on_device("unet", plan, "attention"):
            assert own.unet.dtype == torch.bfloat16
            assert "upcast" in str(next(m for m in own.unet.modules() if hasattr(m, "to_q")).attention)
    assert torch.equal(own.unet.conv_in.weight, weight)


def test_an_offloaded_network_stays_until_another_needs_the_device(dropping: Any) -> None:
    plan = dropping.plan()
    with dropping.run_open():
        with dropping.on_device("unet", plan):
            weight = dropping.known("unet").conv_in.weight
        with dropping.on_device("unet", plan):
            assert dropping.known("unet").conv_in.weight is weight
        del weight
        with dropping.on_device("vae", plan):
            assert loaded(dropping) == {"vae"}
    assert loaded(dropping) == set()


def test_entering_again_costs_microseconds(own: Any) -> None:
    plan, times = own.plan(), []
    with own.run_open():
        for _ in range(50):
            started = time.perf_counter()
            with own.on_device("unet", plan):
                pass
            times.append(time.perf_counter() - started)
    assert sorted(times)[len(times) // 2] < 1e-4


def test_a_function_is_no_network_that_has_to_be_at_work(own: Any) -> None:
    plan, _ = own.plan(), own.unet
    vars(own)["safety_checker"] = lambda images, clip_input: (images, [False] * len(images))
    with own.on_device("safety_checker", plan) as nothing:
        assert nothing is None


def test_threads_that_share_dropped_networks_draw_what_each_draws_alone(dropping: Any) -> None:
    expected = [dropping("a horse", **{**FAST, "seed": seed}).images for seed in range(3)]
    found: dict[int, Any] = {}

    def draw(seed: int) -> None:
        found[seed] = dropping("a horse", **{**FAST, "seed": seed}).images

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[seed], expected[seed]) for seed in range(3))
    assert loaded(dropping) == set()


@pytest.mark.parametrize("state", ["pending", "loaded", "dropped"])
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_pipeline_is_copied_whole(
    how: str, state: str, dropping: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, expected = dropping, opened(tiny_folder)("a horse", **FAST).images
    if state == "loaded":
        pipe.networks["unet"].state_dict()
    elif state == "dropped":
        pipe("a horse", **FAST)
    monkeypatch.undo()  # a plan that is a local function cannot be pickled
    other = pickle.loads(pickle.dumps(pipe)) if how == "pickle" else copy.deepcopy(pipe)
    assert np.array_equal(other("a horse", **FAST).images, expected)
    assert other.unet is not pipe.unet


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch 1.13 compiles nothing")
def test_a_network_that_is_compiled_computes_by_plain_operations(own: Any) -> None:
    unet = own.unet
    own.unet = torch.compile(unet, backend="eager")
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].ff.net[2]
    plan = replanned(own.plan(), onednn_linear=True, winograd=True)
    with own.run_open(), own.on_device("unet", plan):
        assert type(layer) is nn.Linear
    assert not own._request().reloadable


def test_a_network_without_weights_and_without_a_file_is_refused(own: Any) -> None:
    own.vae = copy.deepcopy(own.vae).to("meta")
    with pytest.raises(russet.RussetError, match="no file to read them from"):
        own("a horse", **FAST)


def test_a_network_that_nobody_holds_is_freed(tiny_folder: Path) -> None:
    pipe = opened(tiny_folder)
    pipe("a horse", **FAST)
    networks = [weakref.ref(network) for network in pipe.networks.values()]
    del pipe
    gc.collect()
    assert [network() for network in networks] == [None] * len(networks)


def test_plans_are_told_apart_by_identity(own: Any) -> None:
    plan = own.plan()
    with own.run_open():
        with own.on_device("unet", plan) as unet:
            before = unet.generation
        with own.on_device("unet", dataclasses.replace(plan)) as unet:
            assert unet.generation == before, "the same form moves nothing"
