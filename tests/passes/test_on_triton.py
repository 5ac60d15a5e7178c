"""The passes for CUDA against the plain networks: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from russet import passes
from russet.backends import gemm_heuristics, upsample_heuristics
from russet.backends.cuda import graphs
from russet.backends.triton import geglu, layers, ops
from russet.models.transformer import GEGLU

from .cases import Ask, Case, alone, near, require_same, seeded, state, together, unet, vae

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where conftest.py asks for the interpreter
ids = lambda case: case.name  # noqa: E731
ALL = together("cuda")
TRITON = [case for case in alone("cuda") if {"ops", "upsample_fusion", "packed_projections"} & {*case.values}]
WIDE = {"block_out_channels": (32, 64)}  # narrower maps are left to PyTorch


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: Any) -> Iterator[None]:
    """Kernels for all tensors, and maps of any size enlarged by transposed convolutions."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for module in (ops, layers):
        monkeypatch.setattr(module, "computes", lambda x: True)
    monkeypatch.setattr(upsample_heuristics, "WORTH", 1)
    with torch.no_grad():
        yield


def asked(network: Any, **more: Any) -> Ask:
    ask = Ask.of(network, **more)
    return Ask(
        ask.x.to(DEVICE).contiguous(memory_format=torch.channels_last),
        ask.context.to(DEVICE),
        {name: tensor.to(DEVICE) for name, tensor in ask.conditions.items()},
    )


@pytest.mark.parametrize(
    ("name", "case"),
    [*(("SD 1", case) for case in (ALL, *TRITON)), ("only cross-attention", ALL), ("scale and shift", ALL)],
    ids=str,
)
def test_a_unet_gives_the_plain_answer_and_is_restored(name: str, case: Case) -> None:
    network = unet(name, **WIDE).to(DEVICE, memory_format=torch.channels_last)
    ask, before = asked(network, size=(5, 6)), state(network)
    expected = ask.answer(network)
    changes = case.apply(network)
    near(ask.answer(network, case), expected, 1e-4)
    changes.undo()
    require_same(network, before)
    assert torch.equal(ask.answer(network), expected)


@pytest.mark.parametrize("case", [ALL, *TRITON], ids=ids)
def test_a_vae_gives_the_plain_pictures_and_latents(case: Case) -> None:
    network = vae(block_out_channels=(32, 64)).to(DEVICE, memory_format=torch.channels_last)
    z, x = seeded(2, 4, 5, 7).to(DEVICE), seeded(1, 3, 11, 14, seed=1).to(DEVICE)
    expected = network.decode(z).sample, network.encode(x).latent_dist.mean
    case.apply(network, "vae")
    near(network.decode(z).sample, expected[0], 1e-4)
    near(network.encode(x).latent_dist.mean, expected[1], 1e-4)


@pytest.mark.parametrize("left_out", ["ops", "packed_projections"])
def test_any_one_pass_can_be_deleted(left_out: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(passes, "PASSES", tuple(one for one in passes.PASSES if one.name != left_out))
    network = unet(**WIDE).to(DEVICE, memory_format=torch.channels_last)
    ask = asked(network, size=(4, 4))
    expected = ask.answer(network)
    ALL.apply(network)
    near(ask.answer(network, ALL), expected, 1e-4)


PLACES = (
    ("down_blocks.0.resnets.0", "up_blocks.0.resnets.0.conv_shortcut", "up_blocks.0.upsamplers.0.conv"),
    (
        "down_blocks.0.attentions.0.norm",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "up_blocks.1.resnets.1.conv1",
        "conv_norm_out",
    ),
)
"""What is hooked at a time: the other blocks are still computed by kernels."""


def test_hooks_see_the_plain_tensors_and_those_are_not_overwritten() -> None:
    network = unet(**WIDE).to(DEVICE, memory_format=torch.channels_last)
    ask, seen = asked(network, size=(3, 4)), {}
    expected = ask.answer(network)

    def watch(place: str) -> Any:
        def keep(_: Any, given: Any, result: Any) -> None:
            result = result[0] if isinstance(result, tuple) else result
            tensors = [x for x in (*given, result) if isinstance(x, torch.Tensor)]
            seen.setdefault(place, []).append([(x, x.clone()) for x in tensors])

        return network.get_submodule(place).register_forward_hook(keep)

    hooks = [watch(place) for places in PLACES for place in places]
    ask.answer(network)
    for hook in hooks:
        hook.remove()
    plain = dict(seen)
    seen.clear()
    for places in PLACES:
        hooks = [watch(place) for place in places]
        changes = ALL.apply(network)
        near(ask.answer(network, ALL), expected, 1e-4)
        changes.undo()
        for hook in hooks:
            hook.remove()
    for place, calls in plain.items():
        assert len(seen[place]) == len(calls), place
        for found, shown in zip(seen[place], calls, strict=True):
            for (now, then), (_, wanted) in zip(found, shown, strict=True):
                near(then, wanted, 1e-4)
                assert torch.equal(now, then), place


def test_convolutions_that_tile_are_left_to_pytorch() -> None:
    network = unet(**WIDE).to(DEVICE, memory_format=torch.channels_last)
    for module in network.modules():
        if type(module) is torch.nn.Conv2d:
            module.padding_mode = "circular"
    ask = asked(network, size=(4, 4))
    expected = ask.answer(network)
    ALL.apply(network)
    near(ask.answer(network, ALL), expected, 1e-4)


@pytest.mark.parametrize("family", [ALL], ids=ids)
def test_with_gradients_the_plain_network_computes(family: Case) -> None:
    network = unet(**WIDE).to(DEVICE, memory_format=torch.channels_last).requires_grad_(True)
    ask, gradients = asked(network, size=(4, 4)), []
    for apply in (lambda: None, lambda: family.apply(network)):
        apply()
        network.zero_grad()
        with torch.enable_grad():
            ask.answer(network).square().sum().backward()
        gradients.append([weight.grad for weight in network.parameters()])
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        near(found, expected, 1e-4)


def test_a_gated_layer_in_half_precision_is_one_kernel(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    block = torch.nn.Sequential(GEGLU(128, 256).to(DEVICE).requires_grad_(False))
    x, calls = seeded(2, 65, 128).to(DEVICE), []
    expected = block(x)
    kernel = geglu.gated_product
    monkeypatch.setattr(geglu, "gated_product", lambda *given: calls.append(1) or kernel(*given))
    changes = Case("fused", {"fused_geglu": True}).apply(block)
    assert gemm_heuristics.gates(128, 256)
    near(block.half()(x.half()).float(), expected, 2e-3)
    assert calls == [1]
    changes.undo()
    assert type(block[0]) is GEGLU


def test_a_network_of_the_next_run_is_that_of_which_a_graph_was_captured() -> None:
    network = unet("SD 1", **WIDE).to(DEVICE, memory_format=torch.channels_last)
    captured = []
    for _ in range(2):
        changes = ALL.apply(network)
        captured.append(graphs.identity(network))
        changes.undo()
    assert captured[0] == captured[1] is not None
