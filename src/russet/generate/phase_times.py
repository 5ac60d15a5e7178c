"""How long each phase of a run took."""

from __future__ import annotations

import time


class Clock:
    """Seconds per phase. A phase that is entered again adds up; between ``pause`` and ``enter`` no time counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._phase: str | None = None
        self._began = 0.0

    @property
    def phase(self) -> str | None:
        """The phase whose time counts; None while paused."""
        return self._phase

    def enter(self, phase: str) -> None:
        """Ends the phase before and begins, or goes on with, this one."""
        self.pause()
        self._phase, self._began = phase, time.perf_counter()
        self.seconds.setdefault(phase, 0.0)

    def pause(self) -> None:
        """Stops counting."""
        if self._phase is not None:
            self.seconds[self._phase] += time.perf_counter() - self._began
            self._phase = None
