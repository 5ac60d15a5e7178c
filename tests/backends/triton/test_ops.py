"""The kernels against PyTorch's own operations: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, silu

from russet.backends import norm_heuristics
from russet.backends.gemm_heuristics import gates
from russet.backends.ops import EAGER

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where conftest.py asks for the interpreter
pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from russet.backends.triton import geglu, group_norm, layers, ops, tokens  # noqa: E402
from russet.backends.triton.ops import TritonOps  # noqa: E402
from russet.models.transformer import GEGLU  # noqa: E402


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["whole", "in parts"])
def way(request, monkeypatch):
    """One program for each group, or three kernels that share the work."""
    monkeypatch.setattr(group_norm, "WHOLE", 0 if request.param == "in parts" else 2**20)
    return request.param


def made(*shape: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) + offset
    return numbers.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else numbers


def plain_gate(x: torch.Tensor) -> torch.Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * gelu(gate)


def norm_of(kind: type[nn.Module], *sizes: int) -> nn.Module:
    norm = kind(*sizes).to(DEVICE)
    norm.weight.copy_(made(sizes[-1], seed=8))
    norm.bias.copy_(made(sizes[-1], seed=9))
    return norm


SHAPES = [(2, 20, 5, 7), (1, 96, 9, 15), (3, 40, 1, 1), (1, 8, 13, 40), (2, 560, 3, 45), (1, 4, 61, 97)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("rows", "act"), [(None, None), (1, silu), ("all", silu)])
def test_group_norm_is_that_of_pytorch(shape, rows, act, way):
    norm = norm_of(nn.GroupNorm, 4, shape[1])
    shift = None if rows is None else made(shape[0] if rows == "all" else 1, shape[1], seed=3)
    x = made(*shape, offset=5.0)
    expected = EAGER.group_norm(x, norm, act, shift)
    found = group_norm.group_norm(x, norm, act is not None, shift)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)
    in_place = group_norm.group_norm(x, norm, act is not None, shift, in_place=True)
    assert in_place is x
    assert torch.equal(x, found)


def test_values_far_from_zero_lose_no_variance(way):
    x, norm = made(1, 32, 16, 40, offset=1000.0), norm_of(nn.GroupNorm, 8, 32)
    expected = norm.double()(x.double())
    found = group_norm.group_norm(x, norm.float(), False, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("programs", [1, 2**20])
def test_how_many_programs_share_a_norm_is_free(programs, monkeypatch):
    x, norm = made(2, 64, 40, 45, offset=3.0), norm_of(nn.GroupNorm, 8, 64)
    monkeypatch.setattr(norm_heuristics, "PROGRAMS", programs)
    found = group_norm.group_norm(x, norm, True, None)
    torch.testing.assert_close(found, silu(norm(x)), rtol=1e-4, atol=1e-4)


def test_what_is_added_to_a_map_after_its_norm_is_not_normalised():
    x, later, norm = made(2, 40, 9, 13), made(40, seed=1), norm_of(nn.GroupNorm, 8, 40)
    normed, total = norm(x), x + later[:, None, None]
    found = group_norm.group_norm(x, norm, False, None, later_bias=later)
    torch.testing.assert_close(found, normed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x, total)


@pytest.mark.parametrize(("channels", "more", "rows"), [(320, 64, 2), (20, 12, 1), (130, 127, 4)])
def test_joined_maps_are_those_of_pytorch(channels, more, rows):
    x, kept = made(4, channels, 5, 9), made(rows, more, 5, 9, seed=1)
    found, sums = group_norm.concatenated(x, kept)
    assert torch.equal(found, torch.cat([x, kept.repeat(4 // rows, 1, 1, 1)], dim=1))
    norm = norm_of(nn.GroupNorm, 1, channels + more)
    normed = group_norm.group_norm(found, norm, False, None, sums=sums)
    torch.testing.assert_close(normed, norm(found), rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_maps_that_do_not_fit_together_are_joined_or_refused_by_pytorch(monkeypatch):
    monkeypatch.setattr(ops, "computes", lambda x: True)  # in the interpreter too
    steps, x = TritonOps(), made(2, 8, 4, 4)
    for kept in (made(2, 4, 4, 4).double(), made(2, 4, 4, 4).contiguous()):
        assert torch.equal(steps.cat(x, kept), torch.cat([x, kept], dim=1))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        steps.cat(x, made(2, 4, 4, 5))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("alone", [True, False])
def test_sums_with_a_shift_are_those_of_pytorch_and_so_are_their_norms(rows, alone):
    h, shift, norm = made(2, 20, 9, 29), made(rows, 20, seed=2), norm_of(nn.GroupNorm, 5, 20)
    x = None if alone else made(2, 20, 9, 29, seed=1, offset=7.0)
    expected = h + shift[:, :, None, None] + (0 if x is None else x)
    sums = group_norm.shifted_sum(h, x, shift)
    torch.testing.assert_close(h, expected)
    found = group_norm.group_norm(h, norm, False, shift, sums=sums)
    torch.testing.assert_close(found, norm(expected + shift[:, :, None, None]), rtol=1e-4, atol=1e-4)


def test_sums_are_told_to_the_norm_that_follows_unless_the_map_has_changed(monkeypatch):
    monkeypatch.setattr(ops, "computes", lambda x: True)  # in the interpreter too
    steps, x, shift, norm = TritonOps(), made(2, 40, 9, 9), made(1, 40, seed=2), norm_of(nn.GroupNorm, 4, 40)

    def total() -> torch.Tensor:
        return steps.add(made(2, 40, 9, 9, seed=1), x, shift)

    def is_told(h: torch.Tensor, norm: nn.Module = norm) -> bool:
        h.data.mul_(3)  # which counts as no change, so that the sums of before show
        return not torch.allclose(steps.group_norm(h, norm), norm(h), rtol=1e-4, atol=1e-4)

    h = total()
    assert is_told(h)
    assert not is_told(h)  # once
    assert is_told(steps.cat(x, h), norm_of(nn.GroupNorm, 4, 80))
    assert not is_told(total().mul_(2))
    kept = total()
    assert not is_told(x)
    assert not is_told(kept)  # another norm came between
    with torch.inference_mode():
        assert not is_told(total())


@pytest.mark.parametrize("features", [48, 640])
def test_layer_norm_of_a_sum_is_that_of_pytorch(features):
    h, x, norm = made(2, 7, features), made(2, 7, features, seed=1), norm_of(nn.LayerNorm, features)
    total, normed = EAGER.add_layer_norm(h.clone(), x, norm)
    torch.testing.assert_close(tokens.layer_norm(h, norm, x), normed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h, total)
    torch.testing.assert_close(tokens.layer_norm(x, norm, None), norm(x), rtol=1e-4, atol=1e-5)


def test_what_is_added_after_the_norm_is_not_normalised():
    h, x, shift, norm = made(2, 7, 48), made(2, 7, 48, seed=1), made(48, seed=2), norm_of(nn.LayerNorm, 48)
    total, normed = EAGER.add_layer_norm(h.clone(), x, norm)
    torch.testing.assert_close(tokens.layer_norm(h, norm, x, shift), normed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h, total + shift)


def test_a_product_is_added_to_a_sum_that_has_its_bias(monkeypatch):
    monkeypatch.setattr(ops, "computes", lambda x: True)  # in the interpreter too
    steps, h, x, inner = TritonOps(), made(2, 7, 48), made(2, 7, 48, seed=1), made(2, 7, 96, seed=2)
    norm, last = norm_of(nn.LayerNorm, 48), nn.Linear(96, 48).to(DEVICE)
    total, normed = EAGER.add_layer_norm(h.clone(), x, norm)
    expected = total + last(inner)

    def found() -> torch.Tensor:
        y, again, early = steps.add_layer_norm_before(h.clone(), x, norm, last)
        assert early
        torch.testing.assert_close(again, normed, rtol=1e-4, atol=1e-4)
        return steps.linear_add(inner, last, y, early)

    torch.testing.assert_close(found(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", [24, 600])
def test_the_gate_is_that_of_pytorch(features):
    x = made(2, 5, 2 * features)
    torch.testing.assert_close(tokens.gated(x), plain_gate(x), rtol=1e-5, atol=1e-6)


def test_the_plan_knows_which_products_gate_what_they_make():
    for channels in (32, 96, 320, 640, 1280):
        proj, x = nn.Linear(channels, 8 * channels, device="meta"), torch.empty(2, 77, channels, device="meta")
        assert geglu.takes(x.half(), proj) == gates(channels, 4 * channels)
        assert not geglu.takes(x, proj)


@pytest.mark.parametrize("tokens", [130, 1024])  # a tile and a bit; more than a group of tiles
def test_a_gated_product_is_that_of_pytorch(tokens):
    proj = nn.Linear(128, 512).to(DEVICE)
    x = made(2, tokens // 2, 128)
    expected = plain_gate(proj(x))
    found = geglu.gated_product(x.half(), proj.half())
    assert found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)


def test_the_gate_of_a_product_is_a_gelu_far_out_too():
    proj = nn.Linear(128, 256).to(DEVICE)
    proj.weight.copy_(torch.cat([torch.zeros(128, 128), torch.eye(128)]))
    proj.bias.copy_(torch.cat([torch.ones(128), torch.zeros(128)]))
    x = (
        torch.cat([torch.linspace(-6, 6, 127 * 128), torch.linspace(-5e4, 5e4, 128)])
        .view(1, 128, 128)
        .to(DEVICE)
        .half()
    )
    found = geglu.gated_product(x, proj.half()).double()
    expected = nn.functional.gelu(x.double())
    assert ((found - expected).abs() <= 6e-5 + 2.0**-11 * expected.abs()).all()  # and one rounding


def test_half_precision_is_computed_in_single(way):
    x, norm = made(2, 32, 8, 20).half(), norm_of(nn.GroupNorm, 8, 32)
    expected = EAGER.group_norm(x.float(), norm, silu)
    found = group_norm.group_norm(x, norm.half(), True, None)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)


def test_what_the_kernels_are_not_made_for_is_left_to_pytorch():
    steps, x = TritonOps(), made(1, 8, 4, 4)
    scrambled = x.contiguous()  # not channels-last
    norm, conv = norm_of(nn.GroupNorm, 2, 8), nn.Conv2d(8, 8, 3, padding=1).to(DEVICE)
    for given in (scrambled, x.cpu()):
        there = given.device
        expected = EAGER.group_norm(given, norm.to(there), gelu)
        torch.testing.assert_close(steps.group_norm(given, norm, gelu), expected)
        found, rest = steps.conv(given, conv.to(there))
        assert rest is None
        torch.testing.assert_close(found, conv(given))


def test_a_hooked_layer_is_called(monkeypatch):
    monkeypatch.setattr(ops, "computes", lambda x: True)  # in the interpreter too
    steps, x, seen = TritonOps(), made(1, 40, 4, 4), []
    norm, conv = norm_of(nn.GroupNorm, 4, 40), nn.Conv2d(40, 40, 3, padding=1).to(DEVICE)
    for layer in (norm, conv):
        layer.register_forward_hook(lambda layer, *_: seen.append(layer))
    torch.testing.assert_close(steps.group_norm(x, norm), norm(x))
    torch.testing.assert_close(steps.conv(x, conv)[0], conv(x))
    assert seen == [norm, norm, conv, conv]


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(40, 40, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(40, 40, 3, padding=2, dilation=2),
        nn.Conv2d(40, 40, 3, padding=1, groups=2),
        nn.Conv2d(40, 40, 1, stride=2),
        nn.Conv2d(40, 40, 3, padding=1, bias=False),
    ],
    ids=str,
)
def test_other_convolutions_are_those_of_pytorch(conv, monkeypatch):
    monkeypatch.setattr(ops, "computes", lambda x: True)  # in the interpreter too
    steps, x, conv = TritonOps(), made(1, 40, 6, 6), conv.to(DEVICE)
    expected = conv(x)
    torch.testing.assert_close(steps.add(*insert_none(*steps.conv(x, conv))), expected, rtol=1e-4, atol=1e-4)


def insert_none(h: torch.Tensor, rest: torch.Tensor | None) -> tuple[torch.Tensor, None, torch.Tensor | None]:
    return h, None, rest


def test_the_gate_of_a_layer_is_one_kernel(monkeypatch):
    monkeypatch.setattr(layers, "computes", lambda x: True)  # in the interpreter too
    layer, x, calls = GEGLU(24, 48).to(DEVICE), made(2, 5, 24), []
    expected = layer(x)
    kernel = layers.gated
    monkeypatch.setattr(layers, "gated", lambda y: calls.append(1) or kernel(y))
    layer.__class__ = layers.TritonGEGLU
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert calls
