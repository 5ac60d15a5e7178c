"""Where networks are while they work and while they do not; the pictures do not depend on it."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import russet
from russet.errors import DoesNotFit
from russet.hardware.facts import read_facts
from russet.models import attention
from russet.models.transformer import BasicTransformerBlock
from russet.planning import strategies
from russet.planning.device_defaults import allocator_environment
from russet.residency import kernels
from russet.residency import network as residency
from russet.residency.form import MEMORY_FORMATS, form_of
from russet.residency.streaming import Streaming, own_parameters

from ..families import replanned

FAST = {"num_inference_steps": 2, "output_type": "np", "seed": 1}


@pytest.fixture
def own(tiny_folder: Path) -> Any:
    """The tiny pipeline with networks of its own."""
    pipe = russet.DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights_of(pipe: Any) -> dict[str, torch.device]:
    return {name: next(network.parameters()).device for name, network in pipe._networks().items()}


def test_dropped_weights_are_read_again_for_each_call(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = own("a horse", **FAST).images
    decide = own.plan
    monkeypatch.setattr(own, "plan", lambda **sizes: replanned(decide(**sizes), offload="model", offload_target="disk"))
    own._place()
    assert set(weights_of(own).values()) == {torch.device("meta")}
    for _ in range(2):
        assert np.array_equal(before, own("a horse", **FAST).images)
        assert set(weights_of(own).values()) == {torch.device("meta")}


def test_a_freed_text_encoder_leaves_the_others_in_place(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = own("a horse", **FAST).images
    decide = own.plan
    monkeypatch.setattr(
        own, "plan", lambda **sizes: replanned(decide(**sizes), text_encoder="unloaded", offload_target="disk")
    )
    assert np.array_equal(before, own("a horse", **FAST).images)
    assert weights_of(own) == {
        "vae": torch.device("cpu"),
        "text_encoder": torch.device("meta"),
        "unet": torch.device("cpu"),
    }


def at(network: Any) -> str:
    return str(next(network.parameters()).device)


def test_a_large_text_encoder_that_nobody_looks_at_is_read_for_each_prompt(
    own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = own("a horse", **FAST).images
    assert at(own.known("text_encoder")) == "cpu", "a small one is not worth it"
    monkeypatch.setattr(strategies, "LARGE_TEXT_ENCODER", 0)
    own._plans.plans.clear()
    for _ in range(2):
        output = own("a horse", **FAST)
        assert np.array_equal(before, output.images)
        assert output.plan.text_encoder == "unloaded"
        assert "removed from memory after the prompt is encoded" in output.plan.why("text_encoder").reason
        assert at(own.known("text_encoder")) == "meta"
    assert at(own.known("unet")) == "cpu"


def test_a_text_encoder_that_somebody_has_looked_at_stays(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "LARGE_TEXT_ENCODER", 0)
    own._plans.plans.clear()
    before = own("a horse", **FAST).images
    encoder = own.text_encoder
    assert at(encoder) == "cpu"
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(0.5)
    assert not np.array_equal(before, own("a horse", **FAST).images)
    assert at(own.known("text_encoder")) == "cpu"


def test_saving_a_pipeline_is_no_look_at_its_text_encoder(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strategies, "LARGE_TEXT_ENCODER", 0)
    own._plans.plans.clear()
    own("a horse", **FAST)
    own.save_pretrained(tmp_path / "saved")
    assert at(own.known("text_encoder")) == "meta"
    assert own("a horse", **FAST).plan.text_encoder == "unloaded"
    again = russet.DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    (saved, *_), (mine, *_) = again.text_encoder.parameters(), own.text_encoder.parameters()
    assert torch.equal(saved, mine)


def test_a_frugal_call_and_a_roomy_one_may_follow_each_other(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = own("a horse", **FAST).images
    decide = own.plan
    frugal = {"offload": "model", "offload_target": "disk"}
    for changes in ({"text_encoder": "unloaded", "offload_target": "disk"}, frugal, {}, frugal, {}):
        monkeypatch.setattr(own, "plan", lambda changes=changes, **sizes: replanned(decide(**sizes), **changes))
        away = {name for name in ("unet", "vae") if "offload" in changes}
        seen = []
        hook = own.text_encoder.register_forward_pre_hook(
            lambda *_: seen.append({name for name, at in weights_of(own).items() if at.type == "meta"})  # noqa: B023
        )
        assert np.array_equal(before, own("a horse", **FAST).images)
        hook.remove()
        assert away <= seen[0], "what does not work yet is out of the way from the start"


def test_a_pipeline_whose_weights_were_dropped_saves_whole(own: Any, tmp_path: Path) -> None:
    before = own("a horse", **FAST).images
    own.unet.to("meta")
    own.save_pretrained(tmp_path / "saved")
    assert not residency.of(own.unet).in_memory
    again = russet.DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(before, again("a horse", **FAST).images)


def test_only_networks_that_were_read_from_a_file_may_be_dropped(own: Any, tiny: Any) -> None:
    assert own._request().reloadable
    own.vae = tiny.vae
    assert own._request().reloadable, "whichever pipeline has read them"
    own.vae = copy.deepcopy(tiny.vae)
    assert not own._request().reloadable


def test_streamed_layers_are_on_the_device_one_at_a_time(own: Any) -> None:
    at_home = {name: id(parameter) for name, parameter in own.unet.named_parameters()}
    names = {module: name for name, module in own.unet.named_modules()}
    seen = []

    def check(layer: Any, args: Any) -> None:
        away = {name.rpartition(".")[0] for name, p in own.unet.named_parameters() if id(p) != at_home[name]}
        assert away == {names[layer]}
        seen.append(layer)

    streaming = Streaming(own.unet, torch.device("cpu"))
    layers = [module for module in own.unet.modules() if own_parameters(module)]
    hooks = [layer.register_forward_pre_hook(check) for layer in layers]
    own.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, 32))
    streaming.stop()
    for hook in hooks:
        hook.remove()
    assert set(seen) == set(layers)
    assert {name: id(p) for name, p in own.unet.named_parameters()} == at_home


@pytest.mark.parametrize("mode", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_draws_the_same_picture_and_is_listed_as_the_users(mode: str, own: Any) -> None:
    before = own("a horse", **FAST).images
    getattr(own, mode)(device="cpu")
    output = own("a horse", **FAST)
    assert np.array_equal(before, output.images)
    assert output.plan.why("offload").by == "user"


@pytest.mark.parametrize("given", [{"gpu_id": 0, "device": "cpu"}, {"gpu_id": -1}, {"gpu_id": "0"}, {"gpu_id": 99}])
def test_offload_to_no_device_is_refused(given: dict[str, Any], own: Any) -> None:
    with pytest.raises(russet.RussetError):
        own.enable_model_cpu_offload(**given)
    assert own("a horse", **FAST).images.shape == (1, 64, 64, 3)


def test_convolutions_follow_the_plans_layout_and_pictures_do_not(own: Any, psnr: Any) -> None:
    last = own("a horse", **FAST).images
    assert own.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    own._choose(memory_format="contiguous")
    assert psnr(last, own("a horse", **FAST).images) > 60
    assert own.unet.conv_in.weight.is_contiguous()


def askew(path: Path) -> None:
    """Rewrites a safetensors file so that no tensor begins at a cache line."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes((start + 4 - 8).to_bytes(8, "little") + content[8:start] + b" " * 4 + content[start:])


def test_a_picture_does_not_depend_on_where_weights_lie_in_their_file(
    own: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "askew")
    for path in (tmp_path / "askew").rglob("*.safetensors"):
        askew(path)
    other = russet.DiffusionPipeline.from_pretrained(tmp_path / "askew", safety_checker=None)
    other.set_progress_bar_config(disable=True)
    assert any(value.data_ptr() % 64 for value in other.unet.parameters())
    assert np.array_equal(own("a horse", **FAST).images, other("a horse", **FAST).images)
    assert not any(value.data_ptr() % 64 for value in other.unet.parameters())


def test_the_allocators_variables_are_set_unless_the_user_has_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = allocator_environment("mps")
    for name in variables:
        monkeypatch.delenv(name, raising=False)
    high = next(iter(variables))
    monkeypatch.setenv(high, "0.7")
    kernels.set_environment(torch.device("mps"))
    assert [os.environ.get(name) for name in variables] == ["0.7", None]  # 0.8 for the low one would not do
    monkeypatch.delenv(high)
    kernels.set_environment(torch.device("mps"))
    assert {name: os.environ[name] for name in variables} == variables
    for name in variables:
        del os.environ[name]  # not by monkeypatch, which would put it back


def test_a_size_that_the_device_dislikes_is_drawn_with_a_note(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decide = own.plan
    monkeypatch.setattr(own, "plan", lambda **sizes: replanned(decide(**sizes), size_multiple=64))
    assert own("a horse", **FAST).notes == ()
    assert "72×64 is no multiple of 64" in own("a horse", width=72, **FAST).notes[0]


def test_a_first_pass_that_is_unlike_the_others_is_made_once_and_discarded(
    own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    hook = own.unet.register_forward_pre_hook(lambda unet, args: calls.append(len(args[0])))
    before = own("a horse", **FAST).images  # passes leave a network alone that has a hook
    calls.clear()
    decide = own.plan
    monkeypatch.setattr(own, "plan", lambda **sizes: replanned(decide(**sizes), warm_up=True))
    pictures = [own("a horse", **FAST).images for _ in range(2)]
    hook.remove()
    steps = (len(calls) - 1) // 2
    assert len(calls) == 2 * steps + 1
    assert all(np.array_equal(before, picture) for picture in pictures)


def test_a_model_that_could_not_draw_on_the_cpu_still_loads(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(read_facts("cpu"), memory=10**5, available=10**5, ram=10**5, held=0)
    monkeypatch.setattr("russet.residency.pipeline.read_facts", lambda device=None, weights=0: small)
    pipe = russet.DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    assert pipe.unet.dtype == torch.float32
    with pytest.raises(DoesNotFit):
        pipe("a horse", **FAST)


def test_where_neither_the_new_place_nor_the_old_one_has_room_the_error_is_about_the_new_one(
    own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.to("cpu")
    small = dataclasses.replace(read_facts("cpu"), memory=10**5, available=10**5, ram=10**5, held=0)
    monkeypatch.setattr("russet.residency.pipeline.read_facts", lambda device=None, weights=0: small)
    with pytest.raises(DoesNotFit) as found:
        own.to("cpu", torch.bfloat16)
    assert found.value.__context__ is None
    assert own.unet.dtype == torch.float32


def test_a_module_that_was_put_in_attends_as_the_plan_wants(own: Any) -> None:
    own.enable_attention_slicing("max")
    wanted = form_of("unet", own.plan(), own.device).attention
    layer = next(module for module in own.unet.modules() if isinstance(module, BasicTransformerBlock))
    seen: list[Any] = []
    layer.attn1 = copy.deepcopy(layer.attn1)
    layer.attn1.register_forward_pre_hook(lambda module, args: seen.append(module.attention))
    own("a boat", **FAST)
    assert set(seen) == {wanted} != {attention.fused}
    assert layer.attn1.attention is attention.fused, "a plain network again"


def test_weights_that_lie_elsewhere_are_arranged_again(own: Any) -> None:
    plan = own.plan()
    other = "contiguous" if plan.memory_format == "channels_last" else "channels_last"
    conv = own.unet.conv_out
    for memory_format in (plan.memory_format, other, plan.memory_format):
        with own.at_work("unet", replanned(plan, memory_format=memory_format)):
            assert conv.weight.is_contiguous(memory_format=MEMORY_FORMATS[memory_format])
    conv.weight.data = conv.weight.data.contiguous(memory_format=MEMORY_FORMATS[other])
    with own.at_work("unet", plan):
        assert conv.weight.is_contiguous(memory_format=MEMORY_FORMATS[plan.memory_format])
