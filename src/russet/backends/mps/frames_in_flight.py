"""How far the host may run ahead of the device where nothing in the loop makes it wait."""

from __future__ import annotations

import time
from typing import Any

import torch

POLL = 0.001  # seconds between two questions: a small part of any step that has to be waited for
PATIENCE = 600.0  # seconds


class FramesInFlight:
    """Keeps the host one step ahead of an ``mps`` device: it hands a step over, and waits until the one before is done.

    Without it the progress bar would be full at once, ``interrupt`` and Ctrl-C would come after all the steps, and
    memory and command buffers would pile up. To wait for the step before costs no time: the device has the one that
    was just handed over, and while it works on that the host prepares the next. More steps ahead would gain nothing,
    and on a Mac that takes seconds for a step everything above would be late by as many.

    The wait is a question asked again and again. torch's own, ``Event.synchronize``, keeps Python's lock: no other
    thread could work, and Ctrl-C would not be heard.
    """

    def __init__(self, kept: bool) -> None:
        self._kept = kept
        self._before: Any = None

    def step(self) -> None:
        """To be called when a step has been handed to the device."""
        if not self._kept:
            return
        event = torch.mps.event.Event()
        event.record()  # which also commits what was handed over, so the event is sure to come
        before, self._before = self._before, event
        if before is not None:
            self._kept = arrived(before)


def arrived(event: Any) -> bool:
    """Waits for an event; False if it does not come, as after an error of the device, which a read will tell."""
    until = time.monotonic() + PATIENCE
    while not event.query():
        if time.monotonic() > until:
            return False
        time.sleep(POLL)
    return True
