"""What is measured, in the order of its importance: a run that is out of time drops the rest and says so.

A case is a function of the run; the lists at the end say which cases a GPU run and a CPU run consist of, and what
each costs. Cases of one kind differ by data alone.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .contestants import CONTESTANTS
from .fleet import Lost, environment
from .run import Run

Measure = Callable[[Run], None]


@dataclass(frozen=True)
class Case:
    """``least``: seconds that must be left for the case to be begun, on the machine that the list is meant for."""

    name: str
    measure: Measure
    least: float = 5


# -- kinds of cases


def drawn(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, where there is a picture. A contestant that cannot draw what all are asked for leaves the run."""
    if "failed" in answer:
        raise Lost(answer["failed"])
    return answer


def rates(run: Run) -> None:
    """What the machine itself reaches, and what a picture takes at the least by that."""
    matrix, copy = (512, 1 << 20) if run.tiny else (8192, 1 << 32) if run.device == "cuda" else (2048, 1 << 28)
    with run.part("rates", "machine"):
        worker = run.anyone()
        run.results.add("rates", "machine", **worker.ask("rates", 60, matrix=matrix, copy=copy))
        run.results.add("operations", run.geometry, **worker.ask("operations", 120, side=run.side))
        worker.close()


def load_and_first(run: Run, *, contestant: str, cached: bool = False) -> None:
    """Loading, and the first picture after it; with an empty cache of kernels, or once more with what that left.

    Without ``cached`` the process stays for the cases that follow.
    """
    case = "cached start" if cached else "cold start"
    if not run.wanted([contestant]):
        return
    with run.part(case, contestant):
        worker = run.fresh(contestant) if cached else run.worker(contestant, load=False)
        loaded = worker.ask("load", run.patience)["seconds"]
        first = drawn(worker.ask("picture", run.patience, batch=1, side=run.side, steps=run.steps))
        plan = worker.ask("plan", 60, batch=1, side=run.side)
        run.results.add(case, contestant, load=loaded, **first, **plan)
        if cached:
            worker.close()


def pictures(run: Run, *, contestants: tuple[str, ...], batch: int, rounds: int, case: str) -> None:
    """Seconds of a call, by turns, after one call of each that is not counted."""
    here = run.wanted(contestants)
    size = {"batch": batch, "side": run.side, "steps": run.steps}
    for contestant in here if batch > 1 else ():
        with run.part(case, contestant):  # the first call of a shape chooses algorithms and captures graphs
            warm = drawn(run.worker(contestant).ask("picture", run.patience, **size))
            run.results.add(f"{case}, first", contestant, **warm)
    for _ in range(rounds):
        for contestant in run.wanted(here):
            with run.part(case, contestant):
                answer = drawn(run.worker(contestant).ask("picture", run.patience, **size))
                run.results.add(case, contestant, **answer)


def single_steps(run: Run, *, contestants: tuple[str, ...], rounds: int) -> None:
    """One step of a picture, by turns: each round is a call of a few steps, of which the median counts."""
    for _ in range(rounds):
        for contestant in run.wanted(contestants):
            with run.part("step alone", contestant):
                answer = run.worker(contestant).ask("step", run.patience, side=run.side, steps=3)
                run.results.add("step alone", contestant, **answer)
    for contestant in contestants:  # a CPU's memory does not hold them all
        run.close(contestant)


def quality(run: Run, *, contestants: tuple[str, ...]) -> None:
    """How near each contestant's picture is to that of the plain path in float32, from the same noise.

    In decibels against the reference's own range of values: 40 dB is a hundredth of it.
    """
    kept = {}
    for contestant in ("reference", *run.wanted(contestants)):
        with run.part("quality", contestant):
            path = run.work / f"picture-{contestant}.npy"
            run.worker(contestant).ask("picture", run.patience, batch=1, side=run.side, steps=run.steps, save=str(path))
            kept[contestant] = np.load(path).astype(np.float64)
            path.unlink()
    run.close("reference")
    if (exact := kept.pop("reference", None)) is None:
        return
    plain = kept.get("russet-plain")
    for contestant, picture in kept.items():
        found = {"to_reference": decibels(picture, exact)}
        if plain is not None and contestant != "russet-plain":
            found["to_plain"] = decibels(picture, plain)
        run.results.add("quality", contestant, **found)


def decibels(picture: Any, exact: Any) -> float | None:
    """None where there is no difference at all."""
    error = float(np.sqrt(np.square(picture - exact).mean()))
    return None if error == 0 else float(20 * np.log10((exact.max() - exact.min()) / error))


START = """
import sys
import torch
from {library} import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1]{options})
pipe.to({device!r})
generator = torch.Generator().manual_seed(0)
image = pipe({prompt!r}, num_inference_steps={steps}, generator=generator).images[0]
image.save(sys.argv[2])
"""


def start_to_disk(run: Run, *, rounds: int, steps: int) -> None:
    """A whole program, from its start to its first picture on disk: seconds, and processor seconds, by turns."""
    from .worker import PROMPT

    precision = "float16" if run.device == "cuda" else "float32"
    options = {"diffusers": f", torch_dtype=torch.{precision}", "russet": ""}
    taken = 2 if run.tiny else steps
    for _ in range(rounds):
        for library in run.wanted(("diffusers", "russet")):
            program = START.format(
                library=library, options=options[library], device=run.device, prompt=PROMPT, steps=taken
            )
            run.warm_files()
            command = [sys.executable, "-c", program, str(run.folder), str(run.work / "first.png")]
            with run.part("start to disk", library):
                began = time.perf_counter()
                done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=run.patience)
                seconds = time.perf_counter() - began
                if done.returncode:
                    raise Lost(done.stderr.strip().splitlines()[-1])
                run.results.add("start to disk", library, seconds=seconds, steps=taken)


def growth(run: Run, *, contestants: tuple[str, ...], of: str, at: tuple[int, ...], steps: tuple[int, int]) -> None:
    """Seconds and peak memory against ``of``: "side" in pixels or "batch"; few steps, and a call before that warms up.

    Two numbers of steps tell what a step takes apart from the rest.
    """
    case, few, many = f"growth by {of}", *steps
    for contestant in set(run.fleet) - set(contestants):
        run.close(contestant)
    for value in at:
        size = {"batch": 1, "side": run.side, of: value}
        for contestant in run.wanted(contestants):
            with run.part(case, contestant):
                worker = run.worker(contestant)
                answer = worker.ask("picture", run.patience, **size, steps=few)
                if "failed" not in answer:
                    short = drawn(worker.ask("picture", run.patience, **size, steps=few))
                    answer = drawn(worker.ask("picture", run.patience, **size, steps=many))
                    answer["step"] = (answer["seconds"] - short["seconds"]) / (many - few)
                run.results.add(case, contestant, **size, steps=many, **answer)
                worker.ask("rest", 60)


def fresh_picture(run: Run, *, contestants: tuple[str, ...], rounds: int, steps: int) -> None:
    """A picture in a process that does nothing else: its seconds, and the most memory that it ever had."""
    for _ in range(rounds):
        for contestant in run.wanted(contestants):
            with run.part("fresh picture", contestant):
                worker = run.fresh(contestant)
                loaded = worker.ask("load", run.patience)["seconds"]
                answer = drawn(worker.ask("picture", run.patience, batch=1, side=run.side, steps=steps))
                run.results.add("fresh picture", contestant, load=loaded, steps=steps, **answer)
                worker.close()


# -- the lists

ONE_GPU = ("diffusers", "diffusers-best", "russet", "russet-plain", "russet-deep")
MANY = ("diffusers", "russet", "russet-plain", "russet-deep")
COMPILED = ("diffusers", "diffusers-best", "russet", "russet-deep")
GROWING = ("diffusers", "russet")


def gpu_cases(*, tiny: bool = False) -> list[Case]:
    """For one H100 or H200. ``tiny`` makes the same cases small enough for any CPU."""
    many = 2 if tiny else 16
    soonest_first = sorted(ONE_GPU, key=lambda name: name == "diffusers-best")
    start = [named("cold start", load_and_first, 8, contestant=name) for name in soonest_first]
    again = [name for name in ONE_GPU if CONTESTANTS[name].compiles]
    return [
        Case("rates", rates),
        *start,
        named("batch 1", pictures, contestants=ONE_GPU, batch=1, rounds=1 if tiny else 7, case="batch 1"),
        several(many, 10, contestants=MANY, rounds=1 if tiny else 3),
        named("quality", quality, 10, contestants=ONE_GPU),
        *(named("cached start", load_and_first, 15, contestant=name, cached=True) for name in reversed(again)),
        named("start to disk", start_to_disk, 25, rounds=1 if tiny else 3, steps=2 if tiny else 50),
    ]


def growth_cases(*, tiny: bool = False) -> list[Case]:
    """For the same GPU: how time and memory grow, and compiling for many pictures, which takes over a minute."""
    sides = (32, 64) if tiny else (256, 512, 768, 1024, 1536, 2048)
    batches = (1, 2) if tiny else (1, 2, 4, 8, 16, 32, 64)
    many = 2 if tiny else 16
    few = (1, 2) if tiny else (2, 6)
    return [
        Case("rates", rates),
        named("growth by side", growth, 30, contestants=GROWING, of="side", at=sides, steps=few),
        named("growth by batch", growth, 30, contestants=GROWING, of="batch", at=batches, steps=few),
        several(many, 120, contestants=COMPILED, rounds=1 if tiny else 2),
    ]


def several(many: int, least: float, **data: Any) -> Case:
    """``many`` pictures in a call."""
    return named(f"batch {many}", pictures, least, batch=many, case=f"batch {many}", **data)


EXACT = ("diffusers", "diffusers-last", "russet")
ROUNDED = ("diffusers-bf16", "russet-bf16")


def cpu_cases(*, tiny: bool = False) -> list[Case]:
    """For a machine without a GPU."""
    sides = (32, 64) if tiny else (256, 384, 512)
    few = {"rounds": 1, "steps": 2 if tiny else 20}
    return [
        Case("rates", rates),
        named("step alone", single_steps, 120, contestants=EXACT, rounds=1 if tiny else 2),
        named("fresh picture", fresh_picture, 300, contestants=EXACT, **few),
        named("step alone, bfloat16", single_steps, 120, contestants=ROUNDED, rounds=1 if tiny else 2),
        named("fresh picture, bfloat16", fresh_picture, 300, contestants=ROUNDED, **few),
        named("growth by side", growth, 300, contestants=GROWING, of="side", at=sides, steps=(1, 2)),
    ]


def named(name: str, measure: Callable[..., None], least: float = 5, **data: Any) -> Case:
    return Case(name, functools.partial(measure, **data), least)


LISTS: dict[str, Callable[..., list[Case]]] = {"gpu": gpu_cases, "growth": growth_cases, "cpu": cpu_cases}
