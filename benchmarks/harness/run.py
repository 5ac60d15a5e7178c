"""One run of a list of cases: the processes, the clock, the folder with the model, and the results."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .contestants import CONTESTANTS, caches
from .fleet import Asked, Clock, Here, Lost, Process
from .geometry import GEOMETRIES
from .results import Results

if TYPE_CHECKING:
    from .cases import Case

GRACE = 30.0  # seconds past the budget until a call that runs is given up


class Run:
    """What cases work with.

    ``inline`` has every contestant work in this process, which is for tests. ``only`` are the contestants to measure.
    """

    def __init__(
        self,
        *,
        device: str,
        geometry: str,
        work: Path,
        results: Results,
        budget: float,
        only: tuple[str, ...] = tuple(CONTESTANTS),
        inline: bool = False,
        steps: int = 50,
    ) -> None:
        self.device, self.geometry, self.results, self.only, self.inline = device, geometry, results, only, inline
        self.work, self.folder, self.clock = work, work / "model", Clock(budget)
        self.tiny = geometry == "tiny"
        self.side, self.steps = GEOMETRIES[geometry].side, steps
        work.mkdir(parents=True, exist_ok=True)
        self.fleet: dict[str, Asked] = {}
        self.loaded: set[str] = set()
        self.gone: dict[str, str] = {}

    # -- contestants

    def wanted(self, contestants: Iterable[str]) -> list[str]:
        """Those of a case's contestants that this run is about and that have not failed."""
        return [name for name in contestants if name in self.only and name not in self.gone]

    def fresh(self, contestant: str) -> Asked:
        """A new process of a contestant, ready to load. Kernels that it compiles are kept in this run's own folder."""
        arguments = (contestant, str(self.folder), self.device, self.geometry)
        if self.inline:
            worker: Asked = Here(arguments)
        else:
            kept = caches(self.work / "caches" / contestant)
            worker = Process(arguments, self.work / f"{contestant}.log", kept)
        worker.ask("hello", 120)
        return worker

    def worker(self, contestant: str, *, load: bool = True) -> Asked:
        """The contestant's process, started where there is none yet."""
        if contestant not in self.fleet:
            self.fleet[contestant] = self.fresh(contestant)
        worker = self.fleet[contestant]
        if contestant not in self.loaded:
            self.loaded.add(contestant)
            if load:
                worker.ask("load", self.patience)
        return worker

    def anyone(self) -> Asked:
        """A process for what needs no contestant; it is used once."""
        self.close("russet")
        return self.fresh("russet")

    def close(self, contestant: str) -> None:
        self.loaded.discard(contestant)
        if worker := self.fleet.pop(contestant, None):
            worker.close()

    @property
    def patience(self) -> float:
        """Seconds that one answer may take."""
        return self.clock.left + GRACE

    def log_end(self, contestant: str, lines: int = 25) -> str:
        log = self.work / f"{contestant}.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.is_file() else ""

    # -- the work

    def prepare(self) -> None:
        """Makes the model's folder, unless it is there."""
        if not (self.folder / "model_index.json").is_file():
            maker = self.anyone()
            maker.ask("make", 300)
            maker.close()
        self.warm_files()

    def warm_files(self) -> None:
        """Reads the weights once, so that they are in the system's cache."""
        for path in self.folder.rglob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass

    @contextlib.contextmanager
    def part(self, case: str, contestant: str) -> Iterator[None]:
        """One contestant's part of a case. One that is lost is left out from then on, and the run goes on."""
        began = self.clock.spent
        try:
            if self.clock.left <= 0:
                self.results.drop(f"{case}: {contestant}", "out of time")
                raise Skipped
            yield
        except Skipped:
            raise
        except Lost as lost:
            self.results.drop(f"{case}: {contestant}", str(lost))
            print(
                f"lost: {contestant} in {case}: {lost}", self.log_end(contestant), sep="\n", file=sys.stderr, flush=True
            )
            self.gone[contestant] = str(lost)
            self.close(contestant)
        finally:
            print(f"{self.clock.spent:6.1f} s  {case}: {contestant} ({self.clock.spent - began:.1f} s)", flush=True)

    def carry_out(self, cases: Iterable[Case]) -> None:
        self.prepare()
        for case in cases:
            if self.clock.left < case.least:
                self.results.drop(case.name, f"{max(self.clock.left, 0):.0f} s were left")
                print(f"dropped: {case.name}", file=sys.stderr, flush=True)
                continue
            with contextlib.suppress(Skipped):
                case.measure(self)
        for contestant in list(self.fleet):
            self.close(contestant)


class Skipped(Exception):
    """There is no time left for the rest of a case."""
