"""Contestants in processes of their own, asked one at a time; and the clock that all of it must stay within."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from .contestants import without_network

BENCHMARKS = Path(__file__).parent.parent
SOURCE = BENCHMARKS.parent / "src"


class Lost(Exception):
    """A contestant's process ended, or did not answer in time."""


class Asked(Protocol):
    """A contestant that can be asked: ``ask("picture", batch=1, side=512, steps=50)``."""

    def ask(self, do: str, timeout: float, **arguments: Any) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Clock:
    """A budget in seconds."""

    def __init__(self, budget: float) -> None:
        self.began, self.budget = time.monotonic(), budget

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        return self.budget - self.spent


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """That of every process: no network, and this checkout's Russet before any other."""
    inherited = without_network()
    paths = [str(SOURCE), str(BENCHMARKS), inherited.get("PYTHONPATH", "")]
    return {**inherited, "PYTHONPATH": ":".join(filter(None, paths)), **(extra or {})}


class Process:
    """A worker process. Its output that is no answer goes into a log."""

    def __init__(self, arguments: tuple[str, ...], log: Path, extra: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harness.worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(extra),
            )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            self.answers.put(line)
        self.answers.put("")

    def send(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Lost(self.last_words()) from None

    def answer(self, timeout: float) -> dict[str, Any]:
        try:
            line = self.answers.get(timeout=max(timeout, 1))
        except queue.Empty:
            self.process.kill()
            raise Lost(f"no answer within {timeout:.0f} s") from None
        if not line:
            self.process.wait()
            raise Lost(self.last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        self.send(do, **arguments)
        return self.answer(timeout)

    def last_words(self) -> str:
        """The end of what the process said before it ended."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return (lines[-1] if lines else f"ended with {self.process.poll()}")[:300]

    def close(self) -> None:
        if self.process.stdin is not None and self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()


class Here:
    """A worker in this process, for tests: the same commands, without the seconds that a process takes to start."""

    def __init__(self, arguments: tuple[str, ...]) -> None:
        from .worker import Worker

        self.worker = Worker(*arguments)

    def ask(self, do: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        del timeout
        answer: dict[str, Any] = json.loads(json.dumps(getattr(self.worker, do)(**arguments)))
        return answer

    def close(self) -> None:
        self.worker.pipe = None
