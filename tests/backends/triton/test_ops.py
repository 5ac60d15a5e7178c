"""The kernels against PyTorch's own operations: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from russet.backends import norm_heuristics
from russet.backends.gemm_heuristics import gates
from russet.backends.ops import PLAIN
from russet.models.activations import gelu, silu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where conftest.py asks for the interpreter
pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from russet.backends.triton import geglu, group_norm, ops  # noqa: E402
from russet.backends.triton.ops import Fused  # noqa: E402


def without_its_gradient(x: torch.Tensor) -> bool:
    """Whether the kernels are made for a tensor, wherever it is."""
    return not (torch.is_grad_enabled() and x.requires_grad)


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
    expected = PLAIN.normed(x if shift is None else x + shift[:, :, None, None], norm, act)
    found = group_norm.group_norm(x, norm, act is not None, shift)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)
    in_place = group_norm.group_norm(x, norm, act is not None, shift, spare=True)
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
    found = group_norm.group_norm(x, norm, False, None, later=later)
    torch.testing.assert_close(found, normed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x, total)


@pytest.mark.parametrize(("channels", "more", "rows"), [(320, 64, 2), (20, 12, 1), (130, 127, 4)])
def test_joined_maps_are_those_of_pytorch(channels, more, rows):
    x, kept = made(4, channels, 5, 9), made(rows, more, 5, 9, seed=1)
    found, sums = group_norm.joined(x, kept)
    assert torch.equal(found, torch.cat([x, kept.repeat(4 // rows, 1, 1, 1)], dim=1))
    norm = norm_of(nn.GroupNorm, 1, channels + more)
    normed = group_norm.group_norm(found, norm, False, None, told=sums)
    torch.testing.assert_close(normed, norm(found), rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_maps_that_do_not_fit_together_are_joined_or_refused_by_pytorch(monkeypatch):
    monkeypatch.setattr(ops, "computes", lambda x: True)  # in the interpreter too
    steps, x = Fused(silu, False), made(2, 8, 4, 4)
    for kept in (made(2, 4, 4, 4).double(), made(2, 4, 4, 4).contiguous()):
        assert torch.equal(steps.joined(x, kept), torch.cat([x, kept], dim=1))
    with pytest.raises(RuntimeError, match="Workload of tensors must match"):
        steps.joined(x, made(2, 4, 4, 5))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("alone", [True, False])
def test_sums_with_a_shift_are_those_of_pytorch_and_so_are_their_norms(rows, alone):
    h, shift, norm = made(2, 20, 9, 29), made(rows, 20, seed=2), norm_of(nn.GroupNorm, 5, 20)
    x = None if alone else made(2, 20, 9, 29, seed=1, offset=7.0)
    expected = h + shift[:, :, None, None] + (0 if x is None else x)
    sums = group_norm.shifted_sum(h, x, shift)
    torch.testing.assert_close(h, expected)
    found = group_norm.group_norm(h, norm, False, shift, told=sums)
    torch.testing.assert_close(found, norm(expected + shift[:, :, None, None]), rtol=1e-4, atol=1e-4)


def test_sums_are_told_to_the_norm_that_follows_unless_the_map_has_changed(monkeypatch):
    monkeypatch.setattr(ops, "computes", lambda x: True)  # in the interpreter too
    steps, x, shift, norm = Fused(silu, False), made(2, 40, 9, 9), made(1, 40, seed=2), norm_of(nn.GroupNorm, 4, 40)

    def total() -> torch.Tensor:
        return steps.added(made(2, 40, 9, 9, seed=1), x, shift)

    def is_told(h: torch.Tensor, norm: nn.Module = norm) -> bool:
        h.data.mul_(3)  # which counts as no change, so that the sums of before show
        return not torch.allclose(steps.normed(h, norm), norm(h), rtol=1e-4, atol=1e-4)

    h = total()
    assert is_told(h)
    assert not is_told(h)  # once
    assert is_told(steps.joined(x, h), norm_of(nn.GroupNorm, 4, 80))
    assert not is_told(total().mul_(2))
    kept = total()
    assert not is_told(x)
    assert not is_told(kept)  # another norm came between
    with torch.inference_mode():
        assert not is_told(total())


@pytest.mark.parametrize("features", [48, 640])
def test_layer_norm_of_a_sum_is_that_of_pytorch(features):
    h, x, norm = made(2, 7, features), made(2, 7, features, seed=1), norm_of(nn.LayerNorm, features)
    total, normed = PLAIN.added_norm(h.clone(), x, norm)
    torch.testing.assert_close(ops.layer_norm(h, norm, x), normed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h, total)
    torch.testing.assert_close(ops.layer_norm(x, norm, None), norm(x), rtol=1e-4, atol=1e-5)


def test_what_is_added_after_the_norm_is_not_normalised():
    h, x, shift, norm = made(2, 7, 48), made(2, 7, 48, seed=1), made(48, seed=2), norm_of(nn.LayerNorm, 48)
    total, normed = PLAIN.added_norm(h.clone(), x, norm)
    torch.testing.assert_close(ops.layer_norm(h, norm, x, shift), normed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h, total + shift)


def test_a_product_is_added_to_a_sum_that_has_its_bias(monkeypatch):
    monkeypatch.setattr(ops, "computes", lambda x: True)  # in the interpreter too
    steps, h, x, inner = Fused(silu, False), made(2, 7, 48), made(2, 7, 48, seed=1), made(2, 7, 96, seed=2)
    norm, last = norm_of(nn.LayerNorm, 48), nn.Linear(96, 48).to(DEVICE)
    total, normed = PLAIN.added_norm(h.clone(), x, norm)
    expected = total + last(inner)

    def found(ahead: bool) -> torch.Tensor:
        y, again, early = steps.added_norm_before(h.clone(), x, norm, last)
        assert early == ahead
        torch.testing.assert_close(again, normed, rtol=1e-4, atol=1e-4)
        return steps.product_added(inner, last, y, early)

    torch.testing.assert_close(found(ahead=True), expected, rtol=1e-4, atol=1e-4)
    watched = []
    last.register_forward_hook(lambda *_: watched.append(1))
    torch.testing.assert_close(found(ahead=False), expected, rtol=1e-4, atol=1e-4)
    assert watched


@pytest.mark.parametrize("features", [24, 600])
def test_the_gate_is_that_of_pytorch(features):
    x = made(2, 5, 2 * features)
    torch.testing.assert_close(ops.gated(x), PLAIN.geglu(x, nn.Identity()), rtol=1e-5, atol=1e-6)


def test_the_plan_knows_which_products_gate_what_they_make():
    for channels in (32, 96, 320, 640, 1280):
        proj, x = nn.Linear(channels, 8 * channels, device="meta"), torch.empty(2, 77, channels, device="meta")
        assert geglu.takes(x.half(), proj) == gates(channels, 4 * channels)
        assert not geglu.takes(x, proj)


@pytest.mark.parametrize("tokens", [130, 1024])  # a tile and a bit; more than a group of tiles
def test_a_gated_product_is_that_of_pytorch(tokens):
    proj = nn.Linear(128, 512).to(DEVICE)
    x = made(2, tokens // 2, 128)
    expected = PLAIN.geglu(x, proj)
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
    expected = PLAIN.normed(x.float(), norm, silu)
    found = group_norm.group_norm(x, norm.half(), True, None)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)


def test_what_the_kernels_are_not_made_for_is_left_to_pytorch():
    steps, x = Fused(silu, True), made(1, 8, 4, 4)
    scrambled = x.contiguous()  # not channels-last
    norm, conv = norm_of(nn.GroupNorm, 2, 8), nn.Conv2d(8, 8, 3, padding=1).to(DEVICE)
    for given in (scrambled, x.cpu()):
        there = given.device
        expected = PLAIN.normed(given, norm.to(there), gelu)
        torch.testing.assert_close(steps.normed(given, norm, gelu), expected)
        found, rest = steps.convolved(given, conv.to(there))
        assert rest is None
        torch.testing.assert_close(found, conv(given))


@pytest.mark.parametrize("given", [2, 1])  # rows, of which the text makes two
def test_a_unet_computes_the_same_by_kernels(given, monkeypatch):
    from russet.models.unet import UNet2DConditionModel

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(ops, "computes", lambda x: True)  # in the interpreter too
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=4,
    ).to(DEVICE, memory_format=torch.channels_last)
    for weight in unet.parameters():  # so that none is a neutral 0 or 1
        weight += 0.05 * torch.randn_like(weight)
    x, text = made(given, 4, 8, 8), made(2, 7, 32, seed=1).contiguous()
    expected = unet(x, 500, text).sample
    unet.set_elementwise(Fused(silu, False))
    torch.testing.assert_close(unet(x, 500, text).sample, expected, rtol=1e-3, atol=1e-4)
    kept = []
    for block in unet.down_blocks:  # what somebody watches is not overwritten
        block.resnets[0].register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
    watched = [unet.mid_block.attentions[0], unet.up_blocks[-1].attentions[0]]
    for attention in watched:
        attention.register_forward_pre_hook(lambda module, args: kept.append((args[0], args[0].clone())))
    torch.testing.assert_close(unet(x, 500, text).sample, expected, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(out, before) for out, before in kept)
    assert len(kept) == 4


@pytest.mark.parametrize("trained", ["conv_shortcut.weight", "conv1.bias", "conv2.bias"])
def test_what_alone_is_trained_gets_the_gradient_of_pytorch(trained, monkeypatch):
    from russet.models.spare import Spare

    from russet.models.resnet import Resnet, ResnetStyle

    monkeypatch.setattr(ops, "computes", without_its_gradient)
    block = Resnet(40, 80, ResnetStyle(groups=4, eps=1e-5)).to(DEVICE, memory_format=torch.channels_last)
    weight = block.requires_grad_(False).get_parameter(trained).requires_grad_()
    gradients = []
    for steps in (PLAIN, Fused(silu, False)):
        block.steps = steps
        with torch.enable_grad():
            Spare(made(2, 40, 6, 6)).into(block).square().sum().backward()
        gradients.append(weight.grad)
        weight.grad = None
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)


def test_the_last_bias_of_a_transformer_gets_its_gradient(monkeypatch):
    from russet.models.text import Text

    from russet.models.transformer import SpatialTransformer

    monkeypatch.setattr(ops, "computes", without_its_gradient)
    layer = SpatialTransformer(32, 4, 1, 16, groups=4, linear=True).to(DEVICE, memory_format=torch.channels_last)
    bias = layer.requires_grad_(False).proj_out.bias.requires_grad_()
    layer.steps = Fused(silu, False)
    with torch.enable_grad():
        layer(made(2, 32, 6, 6), Text(made(2, 7, 16)), spare=True).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 2.0 * 36))
