"""What a recording knows of the tensors that it was given."""

from __future__ import annotations

import torch

from russet.backends.cuda.graphs import Given


def test_a_tensor_is_known_until_it_is_written_or_gone() -> None:
    x = torch.zeros(2)
    given = Given(x)
    assert given.is_still(x)
    assert not given.is_still(x.clone())
    x.add_(1)
    assert not given.is_still(x)
    given = Given(x)
    del x
    assert given._x() is None, "a prompt's keys and values are not kept"


def test_what_inference_mode_made_is_never_taken_for_unchanged() -> None:
    with torch.inference_mode():
        x = torch.zeros(2)
        assert not Given(x).is_still(x)
    assert not Given(x).is_still(x)
    assert not Given(torch.zeros(2)).is_still(x)
