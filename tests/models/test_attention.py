from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from russet.errors import InputError
from russet.models import attention
from russet.models.attention import chunked, contiguous, fused, padded, plain, sliced, upcast

HALF = pytest.param(torch.float16, marks=pytest.mark.cpu_half)
METHODS = [
    fused,
    plain,
    sliced(1),
    sliced(3),
    sliced(100),
    chunked(100),
    chunked(64, 50),
    chunked(1000, 1000),
    padded(fused, (32, 64)),
    padded(chunked(33, 700), (64,)),
    upcast(sliced(2)),
    contiguous(fused),
]
LENGTHS = [(1, 1), (1, 77), (77, 77), (768, 77), (767, 129), (97, 768)]
# A result is a mean of values of size 1 under rounded weights: a few units in the last place of each dtype.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def label(method) -> str:
    return re.sub(r"<function (\w+) at \w+>", r"\1", repr(method))


def tensors(n: int, m: int, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (2, 3), dim: int = 24):
    """q, k and v in the memory order of the models: [B, N, H, D] seen as [B, H, N, D]."""
    make = torch.Generator().manual_seed(n * 10000 + m)
    batch, heads = shape
    sizes = [(batch, length, heads, dim) for length in (n, m, m)]
    return tuple(torch.randn(size, generator=make).transpose(1, 2).to(dtype) for size in sizes)


def exact(q, k, v, scale, mask=None):
    """The definition in float64, spelled differently from the code under test."""
    scores = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) * scale
    if mask is not None:
        scores = scores + mask.double()
    weights = torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True))
    return torch.einsum("bhnm,bhmd->bhnd", weights, v.double())


def causal(n: int, dtype: torch.dtype, value: float = float("-inf")) -> torch.Tensor:
    return torch.full((n, n), value, dtype=dtype).triu(1)


def check(method, q, k, v, scale, mask=None) -> None:
    out = method(q, k, v, scale, mask)
    assert out.dtype == q.dtype
    assert out.shape == (*q.shape[:3], v.shape[-1])
    assert (out.double() - exact(q, k, v, scale, mask)).abs().max() < TOLERANCE[q.dtype]


@pytest.mark.parametrize("method", METHODS, ids=label)
@pytest.mark.parametrize(("n", "m"), LENGTHS)
def test_every_method_equals_the_definition_in_float64(method, n, m):
    check(method, *tensors(n, m), scale=24**-0.5)


@pytest.mark.parametrize("method", [fused, sliced(1), chunked(512), chunked(1024, 500)], ids=label)
def test_image_length_sequences_equal_the_definition(method):
    check(method, *tensors(2304, 2304, shape=(1, 2)), scale=24**-0.5)


@pytest.mark.parametrize("method", METHODS, ids=label)
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
def test_half_precision_stays_within_its_rounding(method, dtype):
    for n, m in [(77, 77), (130, 77)]:
        check(method, *tensors(n, m, dtype), scale=24**-0.5)


@pytest.mark.parametrize("method", METHODS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.bfloat16])
def test_a_causal_mask_hides_the_future(method, dtype):
    for value in (float("-inf"), torch.finfo(dtype).min):
        check(method, *tensors(77, 77, dtype), scale=24**-0.5, mask=causal(77, dtype, value))


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_a_mask_broadcasts_over_batch_heads_queries_and_keys(method):
    q, k, v = tensors(70, 51)
    for shape in itertools.product((1, 2), (1, 3), (1, 70), (1, 51)):
        check(method, q, k, v, 0.3, torch.randn(shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("keys", [1, 5, 20])
def test_pieces_of_keys_that_are_masked_out_count_for_nothing(keys):
    q, k, v = tensors(9, 40)
    mask = torch.zeros(1, 1, 1, 40)
    mask[..., :25] = float("-inf")
    check(chunked(4, keys), q, k, v, 0.2, mask)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    queries=st.integers(1, 45),
    keys=st.integers(1, 45),
    rows=st.integers(1, 9),
    scale=st.floats(0.01, 0.5),
)
def test_no_size_of_piece_changes_the_result(n, m, queries, keys, rows, scale):
    q, k, v = tensors(n, m)
    check(chunked(queries, keys), q, k, v, scale)
    check(sliced(rows), q, k, v, scale)


def test_values_may_have_another_width_than_queries():
    q, k, _ = tensors(20, 30)
    v = torch.randn(2, 3, 30, 7)
    for method in METHODS:
        check(method, q, k, v, 0.2)


@pytest.mark.parametrize("scale", [0.5, 0.1, 24**-0.5])
def test_torch_without_a_fused_kernel_and_without_its_scale_argument_gives_the_same(monkeypatch, scale):
    inputs = tensors(33, 77)
    monkeypatch.setattr(attention, "SDPA_TAKES_SCALE", False)
    check(fused, *inputs, scale=scale)
    monkeypatch.setattr(attention, "HAS_SDPA", False)
    check(fused, *inputs, scale=scale)


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"), reason="torch < 2.2")
@pytest.mark.parametrize("dim", [24, 40, 512])
def test_fused_takes_the_flash_kernel_on_the_cpu(dim):
    q, k, v = tensors(64, 77, dim=dim)
    with torch.profiler.profile() as profile:
        fused(q, k, v, 0.2)
        fused(q, k, v, 0.2, torch.zeros(64, 77))
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls.get("aten::_scaled_dot_product_flash_attention_for_cpu") == 2


def storage_of(x):
    return x.untyped_storage() if hasattr(x, "untyped_storage") else x.storage().untyped()  # before torch 2.0


class Largest(torch.overrides.TorchFunctionMode):
    """Notes the most memory, in elements, behind any tensor that a call returns."""

    elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, storage_of(out).nbytes() // out.element_size())
        return out


@pytest.mark.parametrize(
    ("method", "scores"), [(chunked(50, 60), 6 * 50 * 60), (chunked(50), 6 * 50 * 700), (sliced(2), 2 * 600 * 700)]
)
def test_only_as_many_scores_exist_as_were_asked_for(method, scores):
    q, k, v = tensors(600, 700, dim=4)
    mask = torch.zeros(1, 1, 1, 700)
    with Largest() as largest:
        method(q, k, v, 0.5, mask)
    assert largest.elements == scores


def test_a_short_text_is_attended_to_in_fewer_pieces_with_no_more_scores():
    q, k, v = tensors(600, 20, dim=4)
    with Largest() as largest:
        found = chunked(7)(q, k, v, 0.5)
    assert 6 * 7 * 600 * 0.9 < largest.elements <= 6 * 7 * 600
    torch.testing.assert_close(found, plain(q, k, v, 0.5))


def test_joining_the_heads_afterwards_copies_nothing():
    q, k, v = tensors(30, 20)
    ours = [sliced(1), chunked(7, 9)]
    for method in [fused, *ours] if attention.HAS_SDPA else ours:
        assert method(q, k, v, 0.2).transpose(1, 2).is_contiguous()


def test_gradients_flow_through_every_method():
    for method in METHODS:
        q, k, v = (x.clone().requires_grad_() for x in tensors(9, 11))
        method(q, k, v, 0.2).square().sum().backward()
        got = q.grad, k.grad, v.grad
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        exact(q, k, v, 0.2).square().sum().backward()
        for ours, reference in zip(got, (q.grad, k.grad, v.grad), strict=True):
            assert torch.allclose(ours, reference, atol=1e-5)


@pytest.mark.cpu_half
def test_scores_beyond_half_precision_need_upcast():
    q, k, v = (x * scale for x, scale in zip(tensors(8, 8, torch.float16), (300, 300, 1), strict=True))
    assert not plain(q, k, v, 1.0).isfinite().all()
    check(upcast(sliced(1)), q, k, v, 1.0)


def test_contiguous_hands_on_operands_whose_memory_is_in_order():
    def noting(q, k, v, scale, mask=None):
        assert all(x.is_contiguous() for x in (q, k, v))
        return fused(q, k, v, scale, mask)

    inputs = tensors(5, 7)
    assert not inputs[0].is_contiguous()
    check(contiguous(noting), *inputs, scale=0.2)


def test_methods_compare_hash_and_print_as_the_call_that_made_them():
    assert sliced(2) == sliced(2) != sliced(3)
    assert len({chunked(8), chunked(8, None), chunked(8, 8)}) == 2
    assert repr(upcast(padded(chunked(8, 4), (256, 64)))) == (
        "upcast(inner=padded(inner=chunked(queries=8, keys=4), dims=(64, 256)))"
    )


@pytest.mark.parametrize("make", [sliced, chunked, lambda n: chunked(1, n), lambda n: padded(fused, (n,))])
@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4"])
def test_sizes_that_are_no_positive_int_are_refused(make, size):
    with pytest.raises(InputError, match="positive int"):
        make(size)


def test_padding_to_nothing_is_refused():
    with pytest.raises(InputError, match="empty"):
        padded(fused, ())
