"""How long it takes until a program can begin: imports, the command line, and a pipeline that is ready to draw.

Russet beside torch and Diffusers; the pipelines are both made from the small model that Russet carries.

    python benchmarks/start.py [--rounds 7]

Each case is a Python process of its own. The cases take turns, so that whatever else the machine does meets them alike;
the table gives medians of the whole process's seconds and of its processor time, and both as ratios to importing torch.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from russet.checkpoints.arguments import MINI

BASELINE = "import torch"
CASES = {
    "python, nothing imported": "pass",
    BASELINE: "import torch",
    "import russet": "import russet",
    "from russet import DiffusionPipeline": "from russet import DiffusionPipeline",
    "from diffusers import StableDiffusionPipeline": "from diffusers import StableDiffusionPipeline",
    "Russet, a pipeline ready": f"from russet import DiffusionPipeline as P; P.from_pretrained({str(MINI)!r}).unet",
    "Diffusers, a pipeline ready": f"from diffusers import DiffusionPipeline as P; P.from_pretrained({str(MINI)!r})",
    "russet --help": "import sys; sys.argv[1:] = ['--help']; from russet.cli import main; main()",
}


class Sample(NamedTuple):
    """Seconds of one process, and of processor time in it."""

    wall: float
    processor: float


def run(code: str) -> Sample:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Sample(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def measure(rounds: int) -> dict[str, list[Sample]]:
    """Each case's samples, after one process each that is not counted."""
    for code in CASES.values():
        run(code)
    samples: dict[str, list[Sample]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, code in CASES.items():
            samples[name].append(run(code))
    return samples


def table(samples: dict[str, list[Sample]]) -> str:
    """Medians and ratios in Markdown."""
    middle = {name: Sample(*map(statistics.median, zip(*rows, strict=True))) for name, rows in samples.items()}
    base = middle[BASELINE]
    lines = [f"| process | seconds | to {BASELINE} | processor seconds | to {BASELINE} |", "|---|---|---|---|---|"]
    for name, (wall, processor) in middle.items():
        ratios = wall / base.wall, processor / base.processor
        lines.append(f"| {name} | {wall:.2f} | {ratios[0]:.2f} | {processor:.2f} | {ratios[1]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(table(measure(arguments.rounds)))


if __name__ == "__main__":
    main()
