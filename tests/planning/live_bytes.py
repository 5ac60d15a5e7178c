"""Counts the bytes of all tensors alive at once while operations run, each storage once: exact, on any device."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """``with LiveBytes() as counted: …`` then ``counted.peak``: what was made inside and alive at once, in bytes."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {storage(x)._cdata for x in tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for x in tensors(result):
            self.hold(x, inputs)
        return result

    def hold(self, x, inputs):
        kept = storage(x)
        if kept._cdata in inputs and kept._cdata not in self.known:
            return  # a view of something made outside
        if not self.known[kept._cdata]:
            self.live += kept.nbytes()
            self.peak = max(self.peak, self.live)
        self.known[kept._cdata] += 1
        weakref.finalize(x, self.release, kept._cdata, kept.nbytes())

    def release(self, key, size):
        self.known[key] -= 1
        if not self.known[key]:
            del self.known[key]
            self.live -= size


def storage(x):
    return x.untyped_storage() if hasattr(x, "untyped_storage") else x.storage().untyped()


def tensors(tree):
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]
