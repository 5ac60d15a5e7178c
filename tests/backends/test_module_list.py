"""The list of what a network consists of."""

import gc
import weakref

import torch
from torch import nn

from russet.backends.module_list import modules, places


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))


def test_a_network_is_listed_as_torch_lists_it():
    network = small()
    assert modules(network) == tuple(network.modules())


def test_a_change_is_seen_by_the_next_list():
    network = small()
    modules(network)
    network[0] = nn.Linear(2, 3)
    assert network[0] not in modules(network)
    assert network[0] in modules(network, anew=True)
    assert network[0] in modules(network)


def test_a_list_keeps_no_network_alive():
    network = small()
    modules(network)
    gone = weakref.ref(network)
    gc.disable()
    try:
        del network
        assert gone() is None
    finally:
        gc.enable()


def test_weights_that_move_are_in_other_places():
    network = small()
    before = places(network)
    assert len(before) == 2 + 2 + 3
    with torch.no_grad():
        network[0].weight.mul_(2)
    assert places(network) == before
    network[0].weight = nn.Parameter(network[0].weight.clone())
    assert places(network) != before
