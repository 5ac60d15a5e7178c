"""Precomputed timestep embeddings: what the time adds in every residual block is the same for all pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from russet.backends.blocks.inputs import TimeShifts
from russet.backends.blocks.unet import OptimizedUNet
from russet.passes.base import Changes, Footprint, Pass
from russet.passes.blocks import optimize_blocks

AT_ONCE = 50  # times that are computed at once; Stable Diffusion 1.5's take 2 MB in half precision


class TimestepCache:
    """The times of one run as a UNet's residual blocks take them, computed ``AT_ONCE`` together.

    timestep_cond: the vector [1, D] that a UNet distilled with guidance takes with each of them.
    """

    def __init__(self, unet: OptimizedUNet, timesteps: Sequence[float], timestep_cond: Tensor | None = None) -> None:
        self.unet, self.timesteps, self.timestep_cond = unet, tuple(timesteps), timestep_cond
        self._made: dict[float, TimeShifts] = {}

    def __call__(self, t: float) -> TimeShifts | None:
        """One time; None if it is no time of the run."""
        if t not in self._made:
            if t not in self.timesteps:
                return None
            start = self.timesteps.index(t)
            coming = self.timesteps[start : start + AT_ONCE]
            cond = None if self.timestep_cond is None else self.timestep_cond.to(self.unet.device, self.unet.dtype)
            self._made = dict(zip(coming, self.unet.precompute_times(coming, cond), strict=True))
        return self._made[t]


def decide(situation: Any) -> tuple[str, str]:
    if situation.decided["offload"] == "sequential":
        return "each step", "layers come to the device one by one"
    if situation.workload.unet.added:
        return "each step", "this UNet adds the text and the picture's size to the time, which differ from row to row"
    return "precomputed", "what the time adds in each block is the same for every picture and text"


def apply(network: nn.Module, name: str, plan: Any, changes: Changes) -> None:
    if name == "unet":
        optimize_blocks(network, changes)


def precomputed_bytes(situation: Any) -> int:
    """An embedding, and a number for each channel of each residual block, for the times that are computed at once."""
    u = situation.workload.unet
    outputs = sum(u.channels[level] for level, _, _ in u.blocks)
    return int(AT_ONCE * (4 * u.channels[0] + outputs) * situation.decided.width("unet"))


def footprint(situation: Any) -> Footprint:
    precomputed = situation.decided["timestep_embeddings"] == "precomputed"
    return Footprint(kept=precomputed_bytes(situation) if precomputed else 0)


PASS = Pass(
    name="timestep_embeddings",
    meaning="'precomputed': what the UNet makes of the times of a run is computed once; or 'each step'",
    off="each step",
    devices=("mps",),
    elsewhere="launching so little more takes no time here",
    decide=decide,
    apply=apply,
    footprint=footprint,
)
