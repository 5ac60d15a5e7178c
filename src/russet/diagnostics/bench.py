"""How fast a pipeline draws here, and how much memory it takes: one row for the table in docs/en/benchmarks.md."""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from russet import validation
from russet.hardware.facts import Facts, gigabytes, read_facts

PROMPT = "a photo of an astronaut riding a horse on mars"
COLUMNS = ("machine", "memory", "torch", "precision", "picture", "seconds a step", "seconds a picture", "peak memory")
EVERY = 0.005  # seconds between two looks at memory


@dataclass(frozen=True)
class Row:
    """What was measured: medians over several calls, and the highest memory of all of them.

    ``peak`` is in bytes and counts, by ``peak_of``, what torch holds on cuda and mps, or this process's whole memory.
    """

    machine: str
    memory: int
    torch: str
    precision: str
    width: int
    height: int
    images: int
    steps: int
    seconds_a_step: float
    seconds_a_picture: float
    peak: int
    peak_of: str

    def markdown(self) -> str:
        """The row as it goes into the table under ``header()``."""
        cells = (
            self.machine,
            gigabytes(self.memory),
            self.torch,
            self.precision,
            f"{self.width}×{self.height}" + (f" × {self.images}" if self.images > 1 else ""),
            f"{self.seconds_a_step:.3f}",
            f"{self.seconds_a_picture:.2f}",
            f"{gigabytes(self.peak)} ({self.peak_of})",
        )
        return f"| {' | '.join(cells)} |"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def header() -> str:
    """The table's head, in Markdown."""
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def bench(
    pipe: Any, *, width: int | None = None, height: int | None = None, images: int = 1, steps: int = 20, calls: int = 3
) -> Row:
    """Draws with a pipeline and measures; a short call comes first and does not count.

    Raises:
        InputError: a number of images, steps or calls that is not above 0.
        DoesNotFit: the work needs more memory than there is.
    """
    for name, value in {"images": images, "steps": steps, "calls": calls}.items():
        validation.integer(name, value, least=1)
    options = {"width": width, "height": height, "num_images_per_prompt": images, "seed": 0}
    facts = read_facts(pipe.device)
    pipe(PROMPT, num_inference_steps=2, **options)
    seconds, denoising = [], []
    with watched_memory(pipe.device) as peak:
        for _ in range(calls):
            began = time.perf_counter()
            output = pipe(PROMPT, num_inference_steps=steps, **options)
            seconds.append(time.perf_counter() - began)
            denoising.append(output.times["denoise"])
    drawn = output.images[0].size
    return Row(
        machine=f"{facts.chip}, {facts.cores} cores",
        memory=facts.memory,
        torch=torch.__version__,
        precision=output.plan.dtype("unet"),
        width=drawn[0],
        height=drawn[1],
        images=images,
        steps=steps,
        seconds_a_step=statistics.median(denoising) / steps,
        seconds_a_picture=statistics.median(seconds) / images,
        peak=peak(),
        peak_of=whose(facts),
    )


def whose(facts: Facts) -> str:
    return "this process" if memory_reader(torch.device(facts.device)) is process_bytes else "torch"


@contextmanager
def watched_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Watches memory while the block lasts; what it gives tells the most that was seen, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    read, seen, done = memory_reader(device), [0], threading.Event()

    def watch() -> None:
        while not done.wait(EVERY):
            seen[0] = max(seen[0], read())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: max(seen[0], read())
    finally:
        done.set()
        watcher.join()


def memory_reader(device: torch.device) -> Callable[[], int]:
    """What to ask for the memory in use now: torch where it knows, else the operating system about this process."""
    ask = getattr(getattr(torch, device.type, None), "driver_allocated_memory", None)
    if device.type == "mps" and ask is not None:
        return lambda: int(ask())
    if device.type == "cuda":
        return lambda: int(torch.cuda.memory_allocated(device))
    return process_bytes


def process_bytes() -> int:
    """The memory of this process that is in RAM."""
    import psutil

    return int(psutil.Process().memory_info().rss)
