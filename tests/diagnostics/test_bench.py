from __future__ import annotations

import json
import time

import pytest
import torch

from russet.diagnostics.bench import COLUMNS, bench, header, watched_memory
from russet.errors import InputError


@pytest.fixture(scope="module")
def row(shared_mini):
    return bench(shared_mini, width=64, height=96, images=2, steps=3, calls=2)


def test_a_row_says_what_was_drawn_where_and_how_fast(row):
    assert (row.width, row.height, row.images, row.steps) == (64, 96, 2, 3)
    assert row.torch == torch.__version__
    assert row.precision == "float32"
    assert 0 < row.seconds_a_step < row.seconds_a_picture * 2
    assert row.peak > 15_000_000 * 4  # mini's parameters at the least
    assert row.peak_of == "this process"


def test_a_row_fits_under_the_header(row):
    head, rule = header().splitlines()
    assert row.markdown().count("|") == head.count("|") == rule.count("|") == len(COLUMNS) + 1
    assert "64×96 × 2" in row.markdown()


def test_a_row_is_json(row):
    assert json.loads(json.dumps(row.to_dict()))["steps"] == 3


def test_memory_that_came_and_went_is_remembered():
    with watched_memory(torch.device("cpu")) as peak:
        before = peak()
        held = torch.ones(50_000_000)
        time.sleep(0.2)  # for the watcher to look
        del held
        assert peak() >= before + 150_000_000


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"calls": -1}, {"images": 1.5}])
def test_counts_that_make_no_sense_are_refused(shared_mini, wrong):
    with pytest.raises(InputError):
        bench(shared_mini, **wrong)
