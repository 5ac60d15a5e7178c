from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from russet.checkpoints.load_state_dict import SCAN_BLOCK, is_finite

from .made import needs_float8

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NUMBERS = st.lists(st.floats(width=16), max_size=6)


@settings(max_examples=200, deadline=None)
@given(NUMBERS, st.sampled_from(DTYPES))
def test_finite_means_what_torch_means(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    assert is_finite(tensor) == bool(tensor.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_the_largest_number_and_infinity_are_told_apart(value: float, dtype: torch.dtype) -> None:
    assert is_finite(torch.tensor([0.0, value * torch.finfo(dtype).max], dtype=dtype))
    assert not is_finite(torch.tensor([0.0, value * float("inf")], dtype=dtype))


@pytest.mark.parametrize("at", [0, SCAN_BLOCK // 2 - 1, SCAN_BLOCK // 2, 3 * SCAN_BLOCK // 2])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(at: int) -> None:
    tensor = torch.zeros(3 * SCAN_BLOCK // 2 + 1, dtype=torch.float16)
    assert is_finite(tensor)
    tensor[at] = -torch.inf
    assert not is_finite(tensor)


@needs_float8
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_that_is_not_a_number_is_found_too(dtype: str) -> None:
    for values, finite in (([0.5, -448.0], True), ([0.5, float("nan")], False)):
        tensor = torch.tensor(values).to(getattr(torch, dtype))
        assert is_finite(tensor) == finite


def test_the_same_bits_are_scanned_as_the_type_and_layout_that_they_have() -> None:
    memory = bytearray(64)
    bits = torch.frombuffer(memory, dtype=torch.int16)
    bits[:8] = 0x3F80  # 1.0 in the upper half of a float32 and in bfloat16
    bits[8:16] = 0x7F80  # infinity in bfloat16, NaN in float16, a number as a float64
    values = {
        "askew": torch.frombuffer(memory, dtype=torch.bfloat16, offset=34, count=3),
        "numbers": torch.frombuffer(memory, dtype=torch.int16, offset=16, count=4),
        "infinite": torch.frombuffer(memory, dtype=torch.bfloat16, offset=16, count=4).reshape(2, 2).t(),
        "double": torch.frombuffer(memory, dtype=torch.float64, offset=24, count=1),
        "single": torch.frombuffer(memory, dtype=torch.float32, count=4),
        "none": torch.empty(0, 3),
    }
    assert [name for name, value in values.items() if not is_finite(value)] == ["infinite"]
