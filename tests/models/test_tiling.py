from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from russet.errors import InputError
from russet.models.tiling import Tiling, tiled

SIZES = st.tuples(st.integers(1, 20), st.integers(1, 20)).map(lambda pair: Tiling(sum(pair), pair[0]))


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 300), tiling=SIZES)
def test_tiles_cover_everything_and_overlap_enough(length, tiling):
    starts = tiling.starts(length)
    assert starts[0] == 0
    assert starts[-1] + tiling.size == max(length, tiling.size)
    for a, b in pairwise(starts):
        assert 0 < b - a <= tiling.size - tiling.overlap


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 50), width=st.integers(1, 50), tiling=SIZES, unit=st.sampled_from([1, 2, 8]))
def test_what_does_not_look_at_its_neighbours_is_the_same_in_tiles(height, width, tiling, unit):
    def enlarge(x):
        return x.repeat_interleave(unit, 2).repeat_interleave(unit, 3)

    def reduce(x):
        return torch.nn.functional.avg_pool2d(x, unit)

    small = torch.randn(2, 3, height, width)
    large = enlarge(small)
    assert torch.allclose(tiled(enlarge, small, tiling, 1, unit), large, atol=1e-5)
    assert torch.allclose(tiled(reduce, large, tiling, unit, 1), small, atol=1e-5)


def test_tiles_that_disagree_meet_without_a_seam():
    made = iter(range(100))
    out = tiled(lambda x: torch.full_like(x, float(next(made) % 2)), torch.zeros(1, 1, 64, 64), Tiling(16, 8), 1, 1)
    # Neighbouring tiles differ by 1; spread over the 8 that they share, no step may be much above 1/8.
    for steps in (out.diff(dim=2), out.diff(dim=3)):
        assert steps.abs().max() < 0.2
    assert out.max() - out.min() > 0.5


def test_results_keep_their_dtype():
    x = torch.rand(1, 1, 30, 30, dtype=torch.float16)
    out = tiled(torch.clone, x, Tiling(8, 2), 1, 1)
    assert out.dtype == torch.float16
    assert torch.equal(out, x)


@pytest.mark.parametrize(("size", "overlap"), [(8, 0), (8, 8), (1, 1), (0, 0), (8, -1)])
def test_tiles_that_do_not_overlap_properly_are_refused(size, overlap):
    with pytest.raises(InputError, match="overlap"):
        Tiling(size, overlap)
