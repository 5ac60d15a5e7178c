"""Attention on the virtual device: kernels, inner memory and limits by torch version."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from .virtual_mps import ProcessAborted, VirtualMac

pytestmark = pytest.mark.skipif(not hasattr(F, "scaled_dot_product_attention"), reason="came with torch 2.0")

FLOAT = 4


def measured(version: str, q: tuple[int, ...], keys: int | None = None, dtype: torch.dtype = torch.float32, **options):
    """Kernels, and the bytes of the result and on top of it, of one call with q [B, H, N, D]."""
    with VirtualMac(torch=version, shapes_only=True, memory_gib=64) as mac:
        query = torch.empty(q, dtype=dtype, device="mps")
        key = torch.empty(*q[:2], keys or q[2], q[3], dtype=dtype, device="mps")
        with mac.measure() as counts:
            out = F.scaled_dot_product_attention(query, key, key, **options)
        size = out.numel() * out.element_size()
        return counts.kernel_count, size, counts.extra - size


@pytest.mark.parametrize(
    ("version", "head", "has_scores"),
    [
        ("2.5.1", 64, True),
        ("2.12.0", 64, True),
        ("2.13.0", 64, False),
        ("2.13.0", 40, True),
        ("2.13.0", 80, False),
        ("2.13.0", 160, True),
        ("2.13.0", 512, True),
        ("2.14.0", 256, False),
    ],
)
def test_the_score_matrix_is_written_where_no_flash_kernel_is(version, head, has_scores):
    kernels, _, extra = measured(version, (2, 8, 100, head))
    assert kernels == 1
    assert extra == (2 * 8 * 100 * 100 * FLOAT if has_scores else 0)


def test_scores_take_the_dtype_of_the_queries():
    assert measured("2.12.0", (1, 2, 50, 64), keys=77, dtype=torch.float16)[2] == 2 * 50 * 77 * 2


def test_few_queries_have_a_kernel_without_scores_since_2_8():
    assert measured("2.7.1", (1, 2, 8, 64), keys=100)[2] > 0
    assert measured("2.8.0", (1, 2, 8, 64), keys=100)[2] == 0


def test_before_2_5_attention_is_a_composite_with_two_matrices():
    kernels, result, extra = measured("2.4.1", (1, 1, 10, 4))
    assert kernels == 5
    assert result + extra == (2 * 10 * 10 + 2 * 10 * 4) * FLOAT


def test_torch_makes_strided_operands_contiguous_before_2_6_or_macos_15():
    counted = {}
    for version, macos in (("2.5.1", "15.0"), ("2.7.0", "14.0"), ("2.7.0", "15.0")):
        with VirtualMac(torch=version, macos=macos) as mac:
            q = torch.randn(1, 5, 2, 4, device="mps").transpose(1, 2)
            with mac.measure() as counts:
                F.scaled_dot_product_attention(q, q, q)
            counted[version, macos] = counts.kernel_count
    assert counted == {("2.5.1", "15.0"): 4, ("2.7.0", "14.0"): 4, ("2.7.0", "15.0"): 1}


def test_sd_15_at_768_in_float32_aborts_and_in_half_precision_does_not():
    scores = (2, 8, 96 * 96, 40)
    with pytest.raises(ProcessAborted, match=r"total bytes of NDArray > 2\*\*32"):
        measured("2.12.0", scores)
    assert measured("2.12.0", scores, dtype=torch.float16)[2] == 2 * 8 * 9216**2 * 2
    assert measured("2.13.0", (*scores[:3], 64))[2] == 0  # padded to 64, the flash kernel has no scores


def test_scores_beyond_the_memory_are_refused():
    with VirtualMac(memory_gib=8, torch="2.12.0", shapes_only=True):
        held = [torch.empty(3 * 2**30, dtype=torch.int8, device="mps") for _ in range(2)]
        q = torch.empty(1, 8, 14500, 40, dtype=torch.float16, device="mps")
        with pytest.raises(RuntimeError, match="out of memory"):
            F.scaled_dot_product_attention(q, q, q)
        del held


def test_there_is_no_such_function_before_2_0():
    bound = F.scaled_dot_product_attention
    with VirtualMac(torch="1.13.1"):
        q = torch.ones(1, 1, 2, 4, device="mps")
        assert not hasattr(F, "scaled_dot_product_attention")
        with pytest.raises(AttributeError):  # nor for those who kept it
            bound(q, q, q)


def test_scale_came_with_2_1():
    for version, fails in (("2.0.1", True), ("2.1.0", False)):
        with VirtualMac(torch=version):
            q = torch.ones(1, 1, 2, 4, device="mps")
            if fails:
                with pytest.raises(TypeError, match="scale"):
                    F.scaled_dot_product_attention(q, q, q, scale=1.0)
            else:
                F.scaled_dot_product_attention(q, q, q, scale=1.0)


def test_the_result_is_contiguous_as_on_mps():
    with VirtualMac():
        q = torch.randn(2, 5, 3, 8, device="mps").transpose(1, 2)
        assert F.scaled_dot_product_attention(q, q, q).is_contiguous()  # the CPU's own result is not


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.randn(12, 12)}])
def test_values_are_the_cpus_bit_for_bit(options):
    q, k, v = torch.randn(3, 2, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    with VirtualMac():
        there = {name: x.to("mps") if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        assert torch.equal(
            F.scaled_dot_product_attention(q.to("mps"), k.to("mps"), v.to("mps"), **there).cpu(), expected
        )


def test_operands_and_mask_must_be_on_one_device():
    q = torch.ones(1, 1, 2, 4)
    with VirtualMac(), pytest.raises(RuntimeError, match="same device"):
        F.scaled_dot_product_attention(q.to("mps"), q.to("mps"), q.to("mps"), attn_mask=torch.zeros(2, 2))
