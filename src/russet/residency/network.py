"""One object for each network, which knows where its weights are and in what form it computes.

Pipelines may share a network, threads and runs may use it at the same time, and a user may hold it. ``of(network)`` is
what all of them go through. While no run is open that uses a network, it is a plain network: modules, classes, hooks,
attention and tiling are as the user has them, and its weights are where they rest.

Threads take turns: one computes on a device at a time (``AtWork``), and gives others a turn between two steps.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Hashable, Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from russet.backends.cuda.graphs import Graphs
from russet.backends.module_list import modules, places
from russet.checkpoints.load import PendingWeights
from russet.errors import InputError
from russet.passes.base import Changes
from russet.planning.plan import Plan
from russet.residency import changes, freed_memory, weights
from russet.residency.apply import applied, arrange_weights, lay_out
from russet.residency.form import MEMORY_FORMATS, Form, Precision, form_of, resting_device
from russet.residency.streaming import Streaming
from russet.residency.unloaded import mark_loaded, mark_unloaded
from russet.residency.weights import CPU, META


class Use(NamedTuple):
    """What a block of work asks for: ``component`` of a pipeline on ``device`` as ``plan`` says, or more precise."""

    component: str
    plan: Plan
    device: torch.device
    precision: Precision | None

    def same(self, other: Use | None) -> bool:
        """Whether both want the same form. Plans are compared by identity, since this is asked at every step."""
        return other is not None and self.plan is other.plan and self[2:] == other[2:] and self[0] == other[0]


class ManagedNetwork:
    """Where the weights of one network are, what can load them again, and the form that it computes in.

    Attributes:
        lock: held while weights move and while the network is at work.
        source: what reads the weights from their file; None where they came from elsewhere.
        handed_out: whether a user may hold the network and may have changed it.
        compiled: whether ``torch.compile`` has wrapped it: it stays in memory then, and computes by plain operations.
        generation: a number that changes whenever weights have moved in memory.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = weakref.ref(network)
        self.lock = threading.RLock()
        self.source: PendingWeights | None = None
        self.handed_out = False
        self.compiled = False
        self.generation = 0
        self._changed = False
        self._as_read: changes.Snapshot | None = None
        self._checksums: dict[torch.dtype, dict[str, int]] = {}
        self._recordings: weakref.WeakSet[Graphs] = weakref.WeakSet()
        self._device = CPU  # where it computes
        self._resting: torch.device | None = None  # None: where it is
        self._runs: set[object] = set()
        self._uses: list[Use] = []
        self._current: Use | None = None
        self._form: Form | None = None
        self._applied: Changes | None = None
        self._streaming: Streaming | None = None
        self._own_dtype: torch.dtype | None = None  # while it computes in float32 for once
        self._arranged: Hashable = None
        self._moving = False

    @property
    def network(self) -> nn.Module:
        found = self._network()
        assert found is not None, "whoever asks has the network"
        return found

    # -- what it is now

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its weights, loaded or not."""
        value = weights.first(self.network)
        return self._own_dtype or (torch.float32 if value is None else value.dtype)

    @property
    def in_memory(self) -> bool:
        return not weights.is_empty(self.network)

    @property
    def droppable(self) -> bool:
        """Whether weights may be dropped as far as is known: they can be read again, and nobody has changed them."""
        return self.source is not None and not self._changed and not self.compiled

    def is_at(self, device: torch.device) -> bool:
        return weights.is_at(self.network, device)

    def hand_out(self) -> None:
        """A user gets to hold the network: from now on changes are looked for, and it loads itself when it is used."""
        with self._transition():
            if not self.handed_out:
                self.handed_out = True
                self._remember()
            if not self.in_memory and self.source is not None:
                mark_unloaded(self.network, self)

    @property
    def computing_device(self) -> torch.device:
        """Where it computes for the pipelines that have it; where it is, if none has placed it yet."""
        value = weights.first(self.network)
        return self._device if self._resting is not None or value is None or value.is_meta else value.device

    def copied(self, memo: dict[int, Any]) -> nn.Module:
        """A deep copy that is a plain network, without weights if this one has none, which can load them itself."""
        network = self.network
        with self._transition():
            self._end_form()
            mark_loaded(network)
            other: nn.Module = copy.deepcopy(network, memo)
            managed = of(other)
            managed.source, managed._changed = copy.deepcopy(self.source, memo), self._changed
            if not self.in_memory and self.handed_out:
                mark_unloaded(network, self)
            if self._uses:
                self._bring(self._uses[-1])
        return other

    def load_plain(self) -> None:
        """Has a plain network with all of its weights, as it is to be pickled."""
        self.load_for_user()
        with self._transition():
            if not self._uses:
                self._end_form()

    # -- where its weights are

    def place(self, resting: torch.device, dtype: torch.dtype, memory_format: str, computing: torch.device) -> None:
        """Moves weights to where they rest, in a precision; reads them if they are not in memory.

        Weights that move to another device take the layout on the way. Those on the CPU may be a mapped file's, which
        taking a layout would copy; that waits until they work.
        """
        with self._transition():
            self._end_form()
            self._device, self._resting = computing, resting
            if resting == META and not self._may_drop():
                resting = self._resting = CPU
            if resting == META:
                self._drop(dtype)
            elif not self.in_memory or self._rounded_otherwise(dtype):
                self._load(resting, dtype, memory_format)
            else:
                self._move(resting, dtype, memory_format)

    def _rounded_otherwise(self, dtype: torch.dtype) -> bool:
        """Whether the weights were rounded to another half precision than is asked for now, and the file has them all.

        Differs from Diffusers, which rounds what was rounded: a CPU may compute in bfloat16 by default, and a GPU not.
        """
        return self.dtype not in (dtype, torch.float32) and self._may_drop()

    def load(self, device: torch.device = CPU) -> bool:
        """Reads the weights if they are not in memory; whether it did."""
        with self._transition():
            if self.in_memory or self.source is None:
                return False
            self._load(device, self.dtype, "contiguous")
            return True

    def load_for_user(self) -> bool:
        """Loads the weights of a network that is used; False while this thread is doing so already."""
        with self.lock:
            if self._moving:
                return False
            with self._transition():
                if not self.in_memory:
                    self._load(self._device, self.dtype, "contiguous")
                    _visit(self)
                mark_loaded(self.network)
            return True

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Has the weights in memory for as long as the block lasts."""
        fetched = self.load()
        try:
            yield
        finally:
            if fetched:
                with self._transition():
                    self._note_changes()
                    if not (self._uses or self._changed):
                        self._drop(self.dtype)

    def rest(self, device: torch.device | None = None) -> None:
        """Sends the weights to where they rest, unless the network is at work."""
        with self._transition():
            if device is not None:
                self._resting = device
            if not self._uses:
                self._end_form()
                self._to_rest()

    def _to_rest(self) -> None:
        _leave(self)
        resting = self._resting
        if resting is None or not self.in_memory or self.is_at(resting):
            return
        if resting == META and self._may_drop():
            self._drop(self.dtype)
        else:
            self._move(CPU if resting == META else resting, self.dtype)

    def _may_drop(self) -> bool:
        """Whether the weights are those of the file, in every way in which a user may have changed them."""
        if self.source is None or self.compiled:
            return False
        if not self.in_memory:
            return True
        if not self.handed_out:
            return True
        self._note_changes()
        if not self._changed:
            self._changed = changes.held_elsewhere(self.network) or not self._same_values(self.source)
        return not self._changed

    def _same_values(self, source: PendingWeights) -> bool:
        dtype = self.dtype
        if dtype not in self._checksums:
            self._checksums[dtype] = changes.checksums_of_source(source.sources, dtype)
        return changes.same_values(self.network, self._checksums[dtype])

    def _note_changes(self) -> None:
        """Finds what a user has changed since weights were last read or moved; call it before moving them."""
        if self._as_read is not None and not self._changed and self.in_memory:
            self._changed = not self._as_read.is_of(self.network)

    def _remember(self) -> None:
        """Takes the weights as they are now for unchanged; call it after moving them."""
        watched = self.source is not None and self.handed_out and not self._changed
        self._as_read = changes.Snapshot.of(self.network) if watched and self.in_memory else None

    def _load(self, device: torch.device, dtype: torch.dtype, memory_format: str) -> None:
        if self.source is None:
            name = type(self.network).__name__
            raise InputError(
                f"the {name} has no weights in memory (device meta), and no file to read them from is known"
            )
        wanted = "contiguous" if device.type == "cpu" else memory_format
        with torch.inference_mode(False), torch.no_grad():
            layout = MEMORY_FORMATS[wanted]
            self.source.refill(self.network, device=device, dtype=dtype, memory_format=layout)
        mark_loaded(self.network)
        self._moved()

    def _move(self, device: torch.device, dtype: torch.dtype, memory_format: str | None = None) -> None:
        self._note_changes()
        with torch.inference_mode(False), torch.no_grad():
            self.network.to(device, dtype)
            if memory_format is not None and device.type not in ("cpu", "meta"):
                lay_out(self.network, memory_format)
        self._moved()

    def _drop(self, dtype: torch.dtype) -> None:
        self.network.to(META, dtype)
        self._as_read = None
        if self.handed_out:
            mark_unloaded(self.network, self)
        self._moved()

    def _moved(self) -> None:
        self.generation += 1
        self._arranged = None
        for graphs in self._recordings:
            graphs.clear()
        self._remember()

    # -- at work

    def begin_run(self, run: object) -> None:
        """Has the network keep its form between blocks of work, until the run ends."""
        self._runs.add(run)

    def end_run(self, run: object, *, wait: bool = True) -> None:
        """Makes it a plain network again, and has it rest, if no other run uses it.

        wait: False where another thread may hold the lock for long; that thread does it then.
        """
        self._runs.discard(run)
        if self.lock.acquire(blocking=wait):
            try:
                self._finish()
            finally:
                self.lock.release()

    def begin(self, use: Use, graphs: Graphs | None = None) -> None:
        """A block of work begins; the device is this thread's."""
        self.lock.acquire()
        self._uses.append(use)
        try:
            if not (use.same(self._current) and self._ready()):
                self._bring(use)
            if graphs is not None:
                self._recordings.add(graphs)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """A block of work ends; the network stays as it is while a run is open."""
        try:
            self._uses.pop()
            if not self._uses:
                self._finish()
            elif not self._uses[-1].same(self._current):
                self._bring(self._uses[-1])
        finally:
            self.lock.release()

    def _ready(self) -> bool:
        if self._form is None:
            return False
        if self._form.freed_memory is not None:
            freed_memory.keep(self, self._form.freed_memory)
        return True

    def _bring(self, use: Use) -> None:
        """Brings the network into a form, and makes room for it on its device first."""
        form = form_of(use.component, use.plan, use.device, use.precision)
        with self._transition():
            self._device, self._resting = form.device, resting_device(use.component, use.plan, use.device)
            for other in _visitors():
                if other is not self and not other._uses and other._device == form.device:
                    other.rest()
            for other in _copies():
                if other is not self and not other._uses and other._device == form.device:
                    other.free_copies()
            if self._form is not None and self._form != form:
                self._end_form()
            self._arrive(form)
            if self._form is None:
                self._begin_form(form)
            self._current = use

    def _arrive(self, form: Form) -> None:
        """Puts the weights where the form wants them."""
        place = CPU if form.streamed else form.device
        if not self.in_memory:
            self._load(place, form.dtype, form.memory_format)
        elif not self.is_at(place):
            self._move(place, form.dtype, form.memory_format)
        if self._resting is not None and not self.is_at(self._resting):
            _visit(self)
        if form.precise and self._own_dtype is None and self.dtype != torch.float32:
            own = self.dtype
            self._move(place, torch.float32, form.memory_format)
            self._own_dtype = own

    def _begin_form(self, form: Form) -> None:
        network = self.network
        modules(network, anew=True)
        wanted = form.memory_format, form.streamed
        if self._arranged != (wanted, places(network)):
            self._note_changes()
            arrange_weights(network, form)
            self._arranged = wanted, places(network)
            self._remember()
        if form.freed_memory is not None:
            freed_memory.keep(self, form.freed_memory)
        self._form, self._applied = form, applied(network, form, compiled=self.compiled)
        if self._arranged != (wanted, places(network)):  # weights were packed
            self._arranged = wanted, places(network)
            self._remember()
        if self._applied.copied:
            with _LOCK:
                _COPIES.add(self)
        if form.streamed and form.device != CPU:
            self._streaming = Streaming(network, form.device)

    def _end_form(self) -> None:
        """Undoes the form: a plain network, where it is."""
        self._current = None
        if self._streaming is not None:
            self._streaming.stop()
            self._streaming = None
        self._form = None
        if self._applied is not None:
            self._applied.undo()
            self._applied = None
            with _LOCK:
                _COPIES.discard(self)
        freed_memory.release(self)
        if self._own_dtype is not None:
            own, self._own_dtype = self._own_dtype, None
            value = weights.first(self.network)
            self._move(CPU if value is None else value.device, own)

    def free_copies(self) -> None:
        """Frees copies of weights where other networks are to work, which may take all memory; nothing without copies.

        They are made again in a few milliseconds: once a run, where a network works again after another one.
        """
        with self._transition():
            if not self._uses and self._applied is not None and self._applied.copied:
                self._end_form()

    def _finish(self) -> None:
        """What remains to be done when nobody uses the network any more; nothing while somebody does."""
        if self._runs or self._uses or self._moving or self._network() is None:
            return
        pending = self._applied is not None or self._streaming is not None or self._own_dtype is not None
        if pending or self in _visitors():
            with self._transition(finishing=True):
                self._end_form()
                self._to_rest()

    @contextlib.contextmanager
    def _transition(self, finishing: bool = False) -> Iterator[None]:
        """Holds the lock while weights or the form change; whoever uses the network in between sees it as it is."""
        with self.lock:
            outer, self._moving = self._moving, True
            try:
                yield
            finally:
                self._moving = outer
            if not finishing and not outer and self._applied is not None:
                self._finish()  # a run that ended meanwhile could not


_MANAGED: weakref.WeakKeyDictionary[nn.Module, ManagedNetwork] = weakref.WeakKeyDictionary()
_VISITORS: weakref.WeakSet[ManagedNetwork] = weakref.WeakSet()  # on a device where they do not rest
_COPIES: weakref.WeakSet[ManagedNetwork] = weakref.WeakSet()  # that hold copies of weights
_TURNS: dict[torch.device, threading.RLock] = {}
_LOCK = threading.RLock()


def of(network: nn.Module) -> ManagedNetwork:
    """The one object that manages a network; of one that ``torch.compile`` has wrapped, that of the network itself."""
    if (known := _MANAGED.get(network)) is not None:
        return known
    inner = network.__dict__["_modules"].get("_orig_mod", network)
    with _LOCK:
        managed = _MANAGED.get(inner) or ManagedNetwork(inner)
        managed.compiled = managed.compiled or inner is not network
        _MANAGED[inner] = _MANAGED[network] = managed
        return managed


def _visitors() -> list[ManagedNetwork]:
    with _LOCK:
        return [*_VISITORS]


def _copies() -> list[ManagedNetwork]:
    with _LOCK:
        return [*_COPIES]


def _visit(managed: ManagedNetwork) -> None:
    with _LOCK:
        _VISITORS.add(managed)


def _leave(managed: ManagedNetwork) -> None:
    with _LOCK:
        _VISITORS.discard(managed)


def _turn(device: torch.device) -> threading.RLock:
    found = _TURNS.get(device)
    return found if found is not None else _TURNS.setdefault(device, threading.RLock())


class AtWork:
    """A block in which a network is ready to work and this thread's alone; see ``MovesNetworks.at_work``."""

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
