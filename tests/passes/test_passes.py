"""Every pass alone and all of them together compute what the plain network computes, and can be undone exactly."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from russet import passes
from russet.backends.blocks.unet import OptimizedUNet
from russet.passes.base import Changes, Choices

from .cases import (
    ALONE,
    CASES,
    EXACT,
    FAMILIES,
    PADDED,
    TOGETHER,
    UNETS,
    Ask,
    Case,
    near,
    require_same,
    seeded,
    state,
    text_encoder,
    together,
    unet,
    vae,
)

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
SHARED = hasattr(Tensor, "untyped_storage")  # torch 1.13 cannot tell which tensors share memory
PACKS = ("packed_projections", "residual_fusion")
ids = lambda case: case.name  # noqa: E731


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _torch_that_packs(request: Any) -> None:
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if case and not SHARED and any(name in case.values for name in PACKS):
        pytest.skip("torch 1.13 cannot tell what lies where, so nothing is packed")


def exact(case: Case) -> bool:
    values = case.values.items()
    return all(name in EXACT or (name, value) == ("prompt_cache", "keys and values") for name, value in values)


def check(found: Tensor, expected: Tensor, case: Case) -> None:
    if exact(case):
        assert torch.equal(found, expected)
    near(found, expected)


def test_every_pass_and_workaround_has_a_case() -> None:
    assert {name for family in FAMILIES.values() for name in family} == set(passes.OFF)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_unet_gives_the_plain_answer(case: Case, name: str, layout: str) -> None:
    network = unet(name).to(memory_format=FORMATS[layout])
    for images, texts, size in ((1, 2, (8, 8)), (2, 2, (9, 6)), (1, 1, (7, 5)), (3, 1, (8, 8))):
        ask = Ask.of(network, images, texts, size)
        ask = dataclasses.replace(ask, x=ask.x.contiguous(memory_format=FORMATS[layout]))
        expected = ask.answer(network)
        changes = case.apply(network, rows=images * texts)
        found = ask.answer(network, case)
        changes.undo()
        near(found, expected)


@pytest.mark.parametrize("case", [case for case in CASES if exact(case)], ids=ids)
@pytest.mark.parametrize("name", UNETS)
def test_not_a_bit_changes_where_the_same_operations_see_the_same_tensors(name: str, case: Case) -> None:
    network = unet(name)
    for layout in FORMATS.values():
        ask = Ask.of(network.to(memory_format=layout), images=1 if name == "LCM" else 2, texts=1)  # LCM's time has rows
        ask = dataclasses.replace(ask, x=ask.x.contiguous(memory_format=layout))
        expected = ask.answer(network)
        changes = case.apply(network)
        assert torch.equal(ask.answer(network, case), expected)
        changes.undo()


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_unet_with_padded_heads_gives_the_plain_answer(case: Case) -> None:
    network = unet()
    network.set_attention(PADDED)
    ask = Ask.of(network)
    expected = ask.answer(network)
    case.apply(network)
    near(ask.answer(network, case), expected)


@pytest.mark.parametrize("case", TOGETHER, ids=ids)
def test_another_number_of_rows_than_was_decided_for_is_right_too(case: Case) -> None:
    network = unet()
    ask = Ask.of(network, images=3, texts=2)
    expected = ask.answer(network)
    case.apply(network, rows=2)
    near(ask.answer(network, case), expected)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_vae_gives_the_plain_pictures_and_latents(case: Case, layout: str) -> None:
    network = vae().to(memory_format=FORMATS[layout])
    for rows, (height, width) in ((1, (8, 8)), (2, (5, 7))):
        z, x = seeded(rows, 4, height, width), seeded(rows, 3, 2 * height + 1, 2 * width, seed=1)
        z, x = (y.contiguous(memory_format=FORMATS[layout]) for y in (z, x))
        kept = z.clone(), x.clone()
        expected = network.decode(z).sample, network.encode(x).latent_dist.mean
        changes = case.apply(network, "vae")
        found = network.decode(z).sample, network.encode(x).latent_dist.mean
        changes.undo()
        for one, plain in zip(found, expected, strict=True):
            check(one, plain, case)
        assert torch.equal(z, kept[0])
        assert torch.equal(x, kept[1])


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_text_encoder_gives_the_plain_text(case: Case) -> None:
    network, tokens = text_encoder(), torch.arange(2 * 77).reshape(2, 77) % 100
    expected = network(tokens).last_hidden_state
    case.apply(network, "text_encoder")
    check(network(tokens).last_hidden_state, expected, case)


@pytest.mark.parametrize("family", ["cpu", "mps"])
@pytest.mark.parametrize("left_out", passes.PASSES, ids=lambda one: one.name)
def test_any_one_pass_can_be_deleted(left_out: Any, family: str, monkeypatch: Any) -> None:
    kept = tuple(one for one in passes.PASSES if one is not left_out)
    monkeypatch.setattr(passes, "PASSES", kept)
    case = together(family)
    network = unet()
    ask = Ask.of(network)
    expected = ask.answer(network)
    case.apply(network)
    near(ask.answer(network, case), expected)


# -- undo


@pytest.mark.parametrize("name", ["SD 1", "XL", "LCM"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_undoing_restores_the_plain_unet_exactly(case: Case, name: str) -> None:
    network = unet(name)
    ask, before = Ask.of(network), state(network)
    expected = ask.answer(network)
    changes = case.apply(network)
    ask.answer(network, case)
    changes.undo()
    require_same(network, before)
    assert torch.equal(ask.answer(network), expected)
    changes.undo()  # a second time there is nothing to undo
    require_same(network, before)


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_undoing_restores_other_plain_networks_exactly(case: Case, component: str) -> None:
    network = vae() if component == "vae" else text_encoder()
    before = state(network)
    case.apply(network, component).undo()
    require_same(network, before)


@pytest.mark.parametrize("case", TOGETHER, ids=ids)
def test_an_exception_within_apply_leaves_the_plain_network(case: Case, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    for place in range(len(passes.PASSES) + 1):
        broken = dataclasses.replace(passes.PASSES[0], name="broken", off=False, apply=fail)
        network = unet()
        before = state(network)
        choices = Choices({**case.choices().decided, "broken": True}, 2)
        with monkeypatch.context() as patch:
            patch.setattr(passes, "PASSES", (*passes.PASSES[:place], broken, *passes.PASSES[place:]))
            with pytest.raises(MemoryError):
                passes.apply(network, "unet", choices)
        require_same(network, before)


@pytest.mark.parametrize("inner", CASES, ids=ids)
@pytest.mark.parametrize("outer", TOGETHER, ids=ids)
def test_what_was_applied_within_another_is_undone_first(outer: Case, inner: Case) -> None:
    network = unet()
    ask = Ask.of(network)
    expected, plain = ask.answer(network), state(network)
    first = outer.apply(network)
    between = {name: found[:1] for name, found in state(network).items()}
    second = inner.apply(network)
    near(ask.answer(network, inner), expected)
    second.undo()
    assert {name: found[:1] for name, found in state(network).items()} == between
    near(ask.answer(network, outer), expected)
    first.undo()
    require_same(network, plain)


def test_changes_are_undone_last_first() -> None:
    network = unet()
    changes = Changes(network)
    changes.set(network, "note", 1)
    changes.set(network, "note", 2)
    changes.undo()
    assert not hasattr(network, "note")


@pytest.mark.parametrize("case", TOGETHER, ids=ids)
def test_after_undo_a_network_can_be_copied_pickled_and_compiled(case: Case) -> None:
    network = unet()
    ask = Ask.of(network)
    expected = ask.answer(network)
    changes = case.apply(network)
    ask.answer(network, case)
    changes.undo()
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert type(other) is type(network)
        assert torch.equal(ask.answer(other), expected)
    if hasattr(torch, "compile"):
        near(ask.answer(torch.compile(network, backend="eager")), expected)


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch.compile came with torch 2.0")
@pytest.mark.parametrize("case", TOGETHER, ids=ids)
def test_a_compiled_network_is_left_alone(case: Case) -> None:
    network = unet()
    before = state(network)
    ask = Ask.of(network)
    expected = ask.answer(network)
    compiled = torch.compile(network, backend="eager")
    values = {name: value for name, value in case.values.items() if name in {one.name for one in passes.PASSES}}
    case = Case("without workarounds", values)
    case.apply(compiled)
    require_same(network, before)
    near(ask.answer(compiled, case), expected)


@pytest.mark.skipif(not hasattr(torch.nn.Module, "compile"), reason="Module.compile came with torch 2.2")
@pytest.mark.parametrize("case", TOGETHER, ids=ids)
def test_a_part_that_was_compiled_is_left_alone(case: Case) -> None:
    network = unet()
    ask = Ask.of(network)
    expected = ask.answer(network)
    part = network.mid_block.attentions[0].transformer_blocks[0]
    values = {name: value for name, value in case.values.items() if name in {one.name for one in passes.PASSES}}
    part.compile(backend="eager")
    before = state(part)
    case = Case("without workarounds", values)
    case.apply(network)
    require_same(part, before)
    near(ask.answer(network, case), expected)


# -- gradients


@pytest.mark.parametrize("name", ["SD 1", "SD 2", "scale and shift", "LCM"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_results_with_gradients_are_those_of_the_plain_unet(case: Case, name: str) -> None:
    network = unet(name).requires_grad_(True)
    ask = Ask.of(network)

    def learned() -> tuple[Tensor, dict[str, Tensor | None]]:
        network.zero_grad()
        with torch.enable_grad():
            output = ask.answer(network)
            output.square().sum().backward()
        return output.detach(), {key: weight.grad for key, weight in network.named_parameters()}

    plain, expected = learned()
    changes = case.apply(network)
    output, found = learned()
    near(output, plain)
    for key, gradient in expected.items():
        assert (gradient is None) == (found[key] is None), key
        if gradient is not None:
            near(found[key], gradient, 1e-4)  # type: ignore[arg-type]
    changes.undo()
    assert all(weight.requires_grad and weight.is_leaf for weight in network.parameters())


@pytest.mark.parametrize("trained", ["up_blocks.0.resnets.0.conv_shortcut.weight", "mid_block.resnets.0.conv1.bias",
                                     "down_blocks.0.attentions.0.proj_out.bias",
                                     "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"])  # fmt: skip
@pytest.mark.parametrize("case", TOGETHER, ids=ids)
def test_what_alone_is_trained_gets_its_gradient(case: Case, trained: str) -> None:
    network = unet()
    weight, ask = network.get_parameter(trained).requires_grad_(), Ask.of(network)
    gradients = []
    for apply in (lambda: None, lambda: case.apply(network)):
        apply()
        weight.grad = None
        with torch.enable_grad():
            ask.answer(network).square().sum().backward()
        gradients.append(weight.grad)
    near(gradients[1], gradients[0], 1e-4)
    assert not any(other.grad is not None for other in network.parameters() if other is not weight)


@pytest.mark.parametrize("case", TOGETHER, ids=ids)
def test_a_vae_with_gradients_gives_the_plain_gradients(case: Case) -> None:
    network = vae()
    gradients = []
    for apply in (lambda: None, lambda: case.apply(network, "vae")):
        apply()
        z, x = seeded(1, 4, 5, 7).requires_grad_(), seeded(1, 3, 10, 14, seed=1).requires_grad_()
        with torch.enable_grad():
            (network.decode(z).sample.square().sum() + network.encode(x).latent_dist.mean.square().sum()).backward()
        gradients.append((z.grad, x.grad))
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        near(found, expected, 1e-4)


@pytest.mark.parametrize("case", TOGETHER, ids=ids)
def test_passes_applied_in_inference_mode_leave_weights_that_can_be_trained(case: Case) -> None:
    network = unet().requires_grad_(True)
    ask = Ask.of(network)
    with torch.inference_mode():
        changes = case.apply(network)
        ask.answer(network, case)
        changes.undo()
    with torch.enable_grad():
        ask.answer(network).sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


def test_alone_means_alone() -> None:
    assert all(len(case.values) == 1 for case in ALONE)
    network = unet()
    TOGETHER[1].apply(network)
    assert isinstance(network, OptimizedUNet)
