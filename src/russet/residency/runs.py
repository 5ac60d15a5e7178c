"""Runs and blocks of work: for how long a network keeps its form, and whose turn on a device it is."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from types import TracebackType

import torch

from russet.backends.cuda.graphs import Graphs
from russet.residency.network import ManagedNetwork, Use

_TURNS: dict[torch.device, threading.RLock] = {}


def _turn(device: torch.device) -> threading.RLock:
    found = _TURNS.get(device)
    return found if found is not None else _TURNS.setdefault(device, threading.RLock())


class OnDevice:
    """A block in which a network is ready to work and this thread's alone; see ``MovesNetworks.on_device``."""

    def __init__(self, managed: ManagedNetwork, use: Use, graphs: Graphs | None = None) -> None:
        self._managed, self._use, self._graphs = managed, use, graphs
        self._lock = _turn(use.device)

    def __enter__(self) -> ManagedNetwork:
        self._lock.acquire()
        try:
            self._managed.begin(self._use, self._graphs)
        except BaseException:
            self._lock.release()
            raise
        return self._managed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._managed.end()
        finally:
            self._lock.release()


class OpenRun:
    """A run that uses networks: until ``close``, or until nobody holds this any more, they keep their form."""

    def __init__(self, networks: Iterable[ManagedNetwork]) -> None:
        run, used = object(), tuple(networks)
        for managed in used:
            managed.begin_run(run)
        self._run, self._used = run, used
        self._abandoned = weakref.finalize(self, _end_run, run, used, wait=False)
        self._abandoned.atexit = False

    def close(self) -> None:
        """The run has ended; does nothing the second time."""
        if self._abandoned.detach() is not None:
            _end_run(self._run, self._used, wait=True)

    def __enter__(self) -> OpenRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _end_run(run: object, networks: tuple[ManagedNetwork, ...], *, wait: bool) -> None:
    for managed in networks:
        managed.end_run(run, wait=wait)
