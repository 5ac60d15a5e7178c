"""The known defects of mps on the virtual device: wrong where they hold, right where they do not."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from russet.hardware import known_bugs
from russet.hardware.facts import mac as written_mac

from .virtual_mps import ProcessAborted, VirtualMac
from .virtual_mps.defects import DEFECTS
from .virtual_mps.kernels import version

INSTALLED = version(torch.__version__)
needs_torch_2 = pytest.mark.skipif(INSTALLED < (2, 0), reason="needs torch's own attention, and its repaired baddbmm")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def empty_baddbmm():
    x = random(2, 3, 4).to("mps")
    return torch.baddbmm(torch.empty(2, 3, 3, device="mps"), x, x.transpose(1, 2), beta=0)


def wide_heads_of_values():
    q, v = random(1, 2, 9, 8).to("mps"), random(1, 2, 9, 6).to("mps")
    return F.scaled_dot_product_attention(q, q, v)


def causal_in_half():
    q = random(1, 2, 12, 8, dtype=torch.float16).to("mps")
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def strided_attention(queries: int, head: int):
    q = random(1, queries, 2, head).to("mps").transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q)


def large_scores_in_half():
    q = 60 * random(1, 1, 32, 40, dtype=torch.float16).to("mps")
    return F.scaled_dot_product_attention(q, q, random(1, 1, 32, 40, dtype=torch.float16).to("mps"))


def long_batch():
    x = random(1, 2, 33000).to("mps")
    return torch.bmm(x, x.transpose(1, 2))


def long_matrix():
    x = random(2, 33000).to("mps")
    return x @ x.t()


def channels_last():
    x = random(1, 4, 5, 5).to("mps").to(memory_format=torch.channels_last)
    return F.conv2d(x, random(3, 4, 3, 3).to("mps"))


def strided_weight():
    return F.linear(random(2, 3).to("mps"), random(3, 3).to("mps").t())


def plain_linear():
    return F.linear(random(2, 3).to("mps"), random(3, 3).to("mps"))


def mixed_norm():
    return F.layer_norm(random(2, 4, 8, dtype=torch.float16).to("mps"), (8,), random(8).to("mps"), random(8).to("mps"))


def first_product():
    return random(3, 3).to("mps") @ random(3, 3).to("mps")


def expanded_product():
    x = random(1, 20, 3).to("mps").expand(2, -1, -1)
    return torch.bmm(x, random(2, 3, 4).to("mps"))


def single_row():
    return F.linear(random(1, 2).to("mps"), random(3, 2).to("mps"), random(3).to("mps"))


def tokens():
    return F.linear(random(2, 5, 8).to("mps"), random(3, 8).to("mps"), random(3).to("mps"))


def tokens_in_half():
    return F.linear(random(2, 5, 8, dtype=torch.float16).to("mps"), random(3, 8, dtype=torch.float16).to("mps"))


def strided_convolution():
    return F.conv2d(random(1, 4, 5, 5).to("mps"), random(3, 3, 4, 3).to("mps").transpose(1, 2))


def half_of_the_channels():
    return F.conv2d(random(2, 8, 5, 5).to("mps").chunk(2, dim=1)[1], random(3, 4, 3, 3).to("mps"))


def number_of_a_list():
    return torch.tensor([9.0, 2.0, 7.0])[1] * random(2, 2).to("mps")


def number_of_a_list_in_place():
    return random(2, 2).to("mps").div_(torch.tensor([9.0, 2.0, 7.0])[2])


M1, M3, M5 = {"chip": "M1 Pro"}, {"chip": "M3 Max"}, {"chip": "M5", "torch": "2.14.0"}

CASES = [  # a computation, a Mac on which it is wrong, a Mac on which it is right
    pytest.param(empty_baddbmm, {"torch": "2.13.0"}, {"torch": "2.14.0"}, marks=needs_torch_2),
    pytest.param(wide_heads_of_values, {"torch": "2.11.0"}, {"torch": "2.12.0"}, marks=needs_torch_2),
    pytest.param(
        causal_in_half, {"torch": "2.12.1", "macos": "14.0"}, {"torch": "2.13.0", "macos": "14.0"}, marks=needs_torch_2
    ),
    pytest.param(lambda: strided_attention(20, 8), {"torch": "2.5.1"}, {"torch": "2.6.0"}, marks=needs_torch_2),
    pytest.param(lambda: strided_attention(5, 64), {"torch": "2.8.0"}, {"torch": "2.13.0"}, marks=needs_torch_2),
    pytest.param(large_scores_in_half, {"macos": "14.5"}, {"macos": "14.4"}, marks=needs_torch_2),
    (long_batch, M1, M3),
    (long_matrix, {**M1, "torch": "2.7.1"}, {**M1, "torch": "2.6.0"}),
    (channels_last, {"torch": "2.13.0"}, {"bugs": ()}),
    (strided_weight, {"torch": "2.8.0"}, {"torch": "2.9.0"}),
    (strided_convolution, {"torch": "2.13.0", "macos": "15.0"}, {"torch": "2.14.0", "macos": "15.0"}),
    (strided_convolution, {"torch": "2.13.0", "macos": "15.0"}, {"torch": "2.13.0", "macos": "14.6"}),
    (half_of_the_channels, {**M5, "macos": "26.2"}, {**M5, "macos": "26.1"}),
    (half_of_the_channels, {**M5, "macos": "26.2"}, {**M3, "macos": "26.2", "torch": "2.14.0"}),
    (number_of_a_list, {"torch": "2.13.0"}, {"torch": "2.14.0"}),
    (number_of_a_list_in_place, {"torch": "2.13.0"}, {"torch": "2.14.0"}),
    (plain_linear, {"torch": "2.5.1", "macos": "13.2"}, {"torch": "2.5.1", "macos": "13.3"}),
    (mixed_norm, {"torch": "2.13.0"}, {"torch": "2.12.0"}),
    (single_row, {**M1, "macos": "26.1", "torch": "2.13.0"}, {**M1, "macos": "26.1", "torch": "2.14.0"}),
    (single_row, {**M1, "macos": "26.1", "torch": "2.13.0"}, {**M3, "macos": "26.1", "torch": "2.13.0"}),
    (tokens, {**M1, "macos": "26.1", "torch": "2.13.0"}, {**M1, "macos": "26.1", "torch": "2.14.0"}),
    (tokens_in_half, {"chip": "M5", "torch": "2.12.1"}, {"chip": "M5", "torch": "2.13.0"}),
    (expanded_product, {"macos": "15.0"}, {"macos": "14.6"}),
    (first_product, {"torch": "1.13.1"}, {"torch": "2.0.1"}),
]


@pytest.mark.parametrize(("compute", "wrong_on", "right_on"), CASES, ids=[str(number) for number in range(len(CASES))])
def test_a_result_is_wrong_only_where_the_defect_holds(compute, wrong_on, right_on):
    with VirtualMac(bugs=()):
        expected = compute().cpu()
    with VirtualMac(**wrong_on):
        wrong = compute().cpu()
    with VirtualMac(**right_on):
        right = compute().cpu()
    assert torch.equal(right, expected)
    assert wrong.shape != expected.shape or not torch.allclose(wrong, expected, rtol=1e-3)


def test_of_half_of_the_channels_the_first_row_is_right():
    with VirtualMac(bugs=()):
        expected = half_of_the_channels().cpu()
    with VirtualMac(bugs=["sliced-channels"]):
        wrong = half_of_the_channels().cpu()
        assert torch.equal(
            F.conv2d(random(1, 8, 5, 5).to("mps").chunk(2, 1)[1], random(3, 4, 3, 3).to("mps")).cpu(),
            F.conv2d(random(1, 8, 5, 5).chunk(2, 1)[1], random(3, 4, 3, 3)),
        )
    assert torch.equal(wrong[0], expected[0])
    assert not torch.allclose(wrong[1], expected[1])


@pytest.mark.parametrize("own", [torch.Tensor.clone, float, lambda x: x.to("mps")])
def test_a_number_that_is_no_view_is_taken_as_it_is(own):
    with VirtualMac(bugs=["scalar-views"]):
        ones = torch.ones(2, device="mps")
        numbers = torch.tensor([9.0, 2.0, 7.0])
        assert (own(numbers[2]) * ones).tolist() == [7, 7]
        assert (numbers[2] * ones).tolist() == [9, 9]


def test_numbers_of_another_precision_are_no_second_operand():
    with VirtualMac(bugs=["mixed-operands"]):
        x = random(2, 2, dtype=torch.float16).to("mps")
        assert (x * torch.tensor(2.0)).dtype == x.float().to(x).dtype == torch.float16
        assert x[torch.tensor([1], device="mps")].shape == (1, 2)


@needs_torch_2
def test_what_the_classic_slicing_does_turns_nan():
    with VirtualMac(torch="2.12.0"):
        assert empty_baddbmm().isnan().all()
        x = random(2, 3, 4).to("mps")
        assert not torch.baddbmm(torch.zeros(2, 3, 3, device="mps"), x, x.transpose(1, 2), beta=0).isnan().any()
        assert not torch.bmm(x, x.transpose(1, 2)).isnan().any()


@needs_torch_2
def test_overflowing_scores_are_nan_and_an_upcast_helps():
    with VirtualMac(macos="14.5", torch="2.12.0"):
        assert large_scores_in_half().isnan().any()
        q = 60 * random(1, 1, 32, 40).to("mps")
        assert not F.scaled_dot_product_attention(q, q, q).isnan().any()


@needs_torch_2
def test_few_strided_queries_are_right_when_made_contiguous():
    q = random(1, 5, 2, 64).transpose(1, 2)
    expected = F.scaled_dot_product_attention(q, q, q)
    with VirtualMac(torch="2.8.0"):
        there = q.to("mps").contiguous()
        assert torch.equal(F.scaled_dot_product_attention(there, there, there).cpu(), expected)


def test_only_the_first_pass_of_a_shape_differs_on_1_13():
    with VirtualMac(torch="1.13.1"):
        first, second = first_product().cpu(), first_product().cpu()
        assert not torch.equal(first, second)
        assert torch.equal(first_product().cpu(), second)
        assert torch.equal(second, random(3, 3) @ random(3, 3))


@pytest.mark.parametrize(
    ("compute", "dies_on", "lives_on"),
    [
        (
            lambda: F.layer_norm(random(2, 8, dtype=torch.float16).to("mps"), (8,)),
            {"torch": "2.0.1"},
            {"torch": "2.1.2"},
        ),
        (
            lambda: F.gelu(random(2, 8, dtype=torch.float16).to("mps")),
            {"torch": "1.13.1"},
            {"torch": "2.0.1"},
        ),
        (
            lambda: F.linear(random(2, 3).bfloat16().to("mps"), random(3, 3).bfloat16().to("mps").t()),
            {"torch": "2.13.0", "macos": "27.0"},
            {"torch": "2.14.0", "macos": "27.0"},
        ),
        (
            lambda: random(2, 8, dtype=torch.float16).to("mps") - random(2, 8).to("mps"),
            {"torch": "2.5.1", "macos": "14.6"},
            {"torch": "2.5.1", "macos": "15.0"},
        ),
    ],
    ids=["LayerNorm in half", "GELU in half", "transposed bfloat16 weight", "two precisions"],
)
def test_the_process_dies_only_where_the_defect_holds(compute, dies_on, lives_on):
    with VirtualMac(**dies_on), pytest.raises(ProcessAborted):
        compute()
    with VirtualMac(**lives_on):
        compute()


@pytest.mark.parametrize(
    ("compute", "refused_on", "allowed_on"),
    [
        (
            lambda: torch.arange(4).to("mps").max(),
            {"torch": "2.0.1", "macos": "13.2"},
            {"torch": "2.0.1", "macos": "13.3"},
        ),
        (
            lambda: torch.arange(4).to("mps").sort(),
            {"torch": "2.8.0", "macos": "13.0"},
            {"torch": "2.8.0", "macos": "14.0"},
        ),
        (
            lambda: F.interpolate(random(1, 1, 2, 2, dtype=torch.float16).to("mps"), scale_factor=2.0),
            {"torch": "2.5.1", "macos": "12.6"},
            {"torch": "2.5.1", "macos": "13.6"},
        ),
    ],
    ids=["maximum of int64", "sorting int64", "upsampling in half on macOS 12"],
)
def test_an_operator_is_refused_only_where_the_defect_holds(compute, refused_on, allowed_on):
    with VirtualMac(**refused_on), pytest.raises(RuntimeError):
        compute()
    with VirtualMac(**allowed_on):
        compute()


def test_int32_is_reduced_where_int64_is_not():
    with VirtualMac(torch="2.0.1", macos="13.0"):
        assert torch.arange(4, dtype=torch.int32).to("mps").max().item() == 3


def test_bugs_can_be_chosen_and_unknown_ones_are_refused():
    with VirtualMac(bugs=["empty-baddbmm"], torch="2.14.0"):
        assert empty_baddbmm().isnan().all()
    with pytest.raises(ValueError, match="no such bugs"):
        VirtualMac(bugs=["rain"])


def test_the_plans_table_knows_each_defect_wherever_it_holds():
    shared = [defect for defect in DEFECTS if defect.id in known_bugs.BY_ID]
    assert len(shared) >= 13
    torches = ("1.13.1", "2.0.1", "2.1.2", "2.5.1", "2.6.0", "2.8.0", "2.12.1", "2.13.0", "2.14.0")
    for chip, macos, torch_version in itertools.product(
        ("M1", "M2 Pro", "M4", "M5"), ("12.6", "13.2", "14.5", "15.0", "26.2", "27.0"), torches
    ):
        facts = written_mac(chip, memory_gib=16, macos=macos, torch=torch_version)
        for defect in shared:
            if defect.holds(chip, version(torch_version), version(macos)):
                assert known_bugs.affected(facts, defect.id), (defect.id, chip, macos, torch_version)
