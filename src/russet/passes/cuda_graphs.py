"""CUDA graphs: a UNet call is captured once and replayed where launching its kernels takes longer than running them."""

from __future__ import annotations

from russet.passes.base import Footprint, Pass, Situation
from russet.passes.prompt_cache import cached_bytes

LAUNCH_BOUND = 16 * 512 * 512
"""Pixels times rows of a UNet call up to which launching its kernels one by one takes longer than running them.

On an H200 two rows of 512×512 run in a quarter of the time that their launches take. Launched one by one, sixteen rows
took as long as thirty-two, twice the work, where the processor is slow.
"""


def decide(situation: Situation) -> tuple[bool, str]:
    workload, decided = situation.workload, situation.decided
    if decided["offload"] is not None:
        return False, "offloading moves weights between calls"
    rows = workload.rows * min(decided["micro_batch"], workload.images)
    if rows * workload.width * workload.height > LAUNCH_BOUND:
        return False, "kernels of this size run longer than it takes to launch them"
    return True, "launching the kernels one by one would take longer than running them"


def footprint(situation: Situation) -> Footprint:
    """A graph has its own copy of the text's keys and values."""
    return Footprint(kept_after=cached_bytes(situation) if situation.decided["prompt_cache"] != "off" else 0)


PASS = Pass(
    name="cuda_graphs",
    meaning="True: UNet calls are captured as CUDA graphs and replayed",
    off=False,
    devices=("cuda",),
    elsewhere="only CUDA has graphs",
    decide=decide,
    footprint=footprint,
)
