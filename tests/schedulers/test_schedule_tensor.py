from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from russet import EulerDiscreteScheduler
from russet.schedulers.scheduler import ScheduleTensor


def numbers() -> Tensor:
    return ScheduleTensor.of(torch.tensor([9.0, 2.0, 7.0]))


def stored(x: Tensor) -> Tensor:
    """Through a file, as torch writes it."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    options = {"weights_only": False} if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 0) else {}
    return torch.load(file, **options)


@pytest.mark.parametrize(
    "element",
    [
        lambda x: x[1],
        lambda x: x[torch.tensor(1)],
        lambda x: x[np.int64(1)],
        lambda x: list(x)[1],
        lambda x: x[1:][0],
        lambda x: x.narrow(0, 1, 2)[0],
        lambda x: x.split(1)[1].squeeze(0),
        lambda x: x.sort().values[0],
        lambda x: copy.deepcopy(x)[1],
        lambda x: copy.copy(x)[1],
        lambda x: pickle.loads(pickle.dumps(x))[1],
        lambda x: stored(x)[1],
        lambda x: x.to("cpu").float()[1],
        lambda x: x.clone().contiguous()[1],
    ],
)
def test_an_element_is_a_plain_tensor_with_a_storage_of_its_own(element):
    found = element(numbers())
    assert type(found) is Tensor
    assert (found.item(), found.dim(), found.storage_offset()) == (2, 0, 0)
    assert float(found) == 2


def test_it_is_a_tensor_for_everything_else():
    x, plain = numbers(), torch.tensor([9.0, 2.0, 7.0])
    assert isinstance(x, Tensor)
    assert torch.equal(x, plain)
    assert x.tolist() == plain.tolist()
    assert len(x) == 3
    assert "9., 2., 7." in repr(x)
    assert 7 in x
    assert np.array_equal(x.numpy(), plain.numpy())
    assert np.array_equal(np.array(x), plain.numpy())
    assert np.interp(1.5, [0, 1, 2], x) == 4.5
    assert (x.dtype, x.shape, x.device.type) == (torch.float32, (3,), "cpu")
    assert torch.equal(torch.from_numpy(np.asarray(x)) + x, 2 * plain)
    assert (x == 2).nonzero().tolist() == [[1]]
    assert x.max(0) == (9, 0)
    assert [int(t) for t in reversed(x)] == [7, 2, 9]


def test_it_can_be_written_to_and_shares_its_memory_with_its_parts():
    x = numbers()
    x[1] = 3
    x[1:].mul_(2)
    assert x.tolist() == [9, 6, 14]


def test_a_deep_copy_has_memory_of_its_own_and_is_made_once():
    x = numbers()
    first, second = copy.deepcopy([x, x])
    assert first is second
    first[0] = 1
    assert (x.tolist()[0], type(first)) == (9, ScheduleTensor)


def test_results_of_other_shapes_are_plain():
    x = numbers()
    for made in (x[:, None], x.view(3, 1) * torch.ones(3, 2), x.outer(x), x.sum()):
        assert type(made) is Tensor
    assert type(x * x) is ScheduleTensor


def test_gradients_go_through_what_is_computed_from_it():
    factor = torch.ones(3, requires_grad=True)
    (numbers() * factor).sum().backward()
    assert factor.grad.tolist() == [9, 2, 7]


def test_a_schedulers_numbers_are_such_before_and_after_it_was_copied_or_pickled():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    for one in (scheduler, copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        for name in ("sigmas", "timesteps", "alphas_cumprod", "betas"):
            element = getattr(one, name)[2]
            assert (type(element), element.storage_offset()) == (Tensor, 0), name
