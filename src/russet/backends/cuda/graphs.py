"""Calls of a network recorded as CUDA graphs: launched as a whole, where a launch for each kernel would be the slower.

A guided UNet call of Stable Diffusion 1.5 at 512×512 keeps an H200 busy for 9.3 ms, and its launches keep the CPU busy
for 22.8 (float16, PyTorch's own kernels); replayed, the same call takes 9.6.

A recording reads and writes fixed places in memory. What it is given is copied to them, and what it gives is copied
out, so that callers notice nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from russet.backends.module_list import modules, places
from russet.backends.ops import hooked

Call = Callable[..., tuple[Tensor, ...]]

KEPT = 6  # recordings: one more drops the one that was not used for longest


class Given:
    """Which tensor was given, and as of when. It is not kept: a prompt's keys and values are large."""

    def __init__(self, x: Tensor) -> None:
        self._x, self._version = weakref.ref(x), None if x.is_inference() else x._version

    def is_still(self, x: Tensor) -> bool:
        """Whether x is that tensor, unchanged. torch does not count the changes of what inference mode made."""
        return self._x() is x and self._version is not None and self._version == x._version


class Recording:
    """One call as a graph, for inputs of one shape."""

    def __init__(self, call: Call, inputs: Sequence[Tensor], pool: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():  # else they could not be written outside of that mode
            self._inputs = [x.clone() for x in inputs]
        self._given = [Given(x) for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._outputs = call(*self._inputs)
        release_workspaces()

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for i, x in enumerate(inputs):
            if not self._given[i].is_still(x):  # the text is the same in all steps
                self._inputs[i].copy_(x)
                self._given[i] = Given(x)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)


class Graphs:
    """The recordings of one pipeline. Each call is made plainly the first time, recorded the second, then replayed."""

    def __init__(self) -> None:
        self._recordings: dict[Hashable, Recording | None] = {}
        self._pool: Any = None
        self._lock = threading.Lock()  # a recording's places in memory serve one call at a time

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs()  # a copied pipeline has other weights

    def run(self, name: Hashable, call: Call, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``call(*inputs)``, replayed where it was recorded. ``name`` tells calls apart that read other weights.

        What is recorded depends on the inputs' values in no way but through their tensors.
        """
        key = (name, *((x.shape, x.dtype, x.stride()) for x in inputs))
        with self._lock:
            if key not in self._recordings:
                self._remember(key, None)  # seen: libraries start and kernels are compiled in this first call
                return call(*inputs)
            recording = self._recordings.pop(key)
            if recording is None:
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                recording = Recording(call, inputs, self._pool)
            self._remember(key, recording)
            return recording(inputs)

    def clear(self) -> None:
        """Forgets all recordings and frees what they hold."""
        with self._lock:
            self._recordings.clear()
            self._pool = None

    def _remember(self, key: Hashable, recording: Recording | None) -> None:
        self._recordings[key] = recording
        while len(self._recordings) > KEPT:
            del self._recordings[next(iter(self._recordings))]


def release_workspaces() -> None:
    """Lets go of what cuBLAS was given to work in: 33 MiB for each stream on an H100, and recording has its own stream.

    A recording goes on using it when it is replayed: it lies in the recordings' pool, where one replay comes after the
    other.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # no public name does it
    if clear is not None:
        clear()


def identity(network: nn.Module) -> Hashable | None:
    """What a recording of a network's call depends on besides its inputs; None where it must not be recorded.

    Those are the addresses of its weights, and the classes and functions that its modules compute by. Hooks are run by
    Python, which a recording is not.
    """
    forms: set[Any] = set()
    for module in modules(network):
        if hooked(module):
            return None
        forms.add((type(module), vars(module).get("attention"), vars(module).get("ops")))
    return frozenset(forms), places(network)
