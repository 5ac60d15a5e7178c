"""How long each phase of a call took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Collects seconds per phase: ``with clock.phase("text"): …``; a phase that comes again adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
