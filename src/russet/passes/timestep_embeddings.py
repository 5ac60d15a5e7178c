"""Precomputed timestep embeddings: what the time adds in every residual block is the same for all pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from russet.backends.blocks.inputs import TimeShifts
from russet.backends.blocks.unet import OptimizedUNet
from russet.models.embeddings import TimestepEmbedding
from russet.passes.base import (
    LAYER_BY_LAYER,
    OPTIMIZED_UNET,
    Changes,
    Choices,
    Footprint,
    Pass,
    Situation,
    holds_untouched,
)
from russet.passes.blocks import optimize_blocks

AT_ONCE = 50  # times that are computed at once; Stable Diffusion 1.5's take 2 MB in half precision


class TimestepCache:
    """The times of one run as a UNet's residual blocks take them, computed ``AT_ONCE`` together.

    timestep_cond: the vector [1, D] that a UNet distilled with guidance takes with each of them.
    """

    def __init__(self, unet: nn.Module, timesteps: Sequence[float], timestep_cond: Tensor | None = None) -> None:
        self.unet, self.timesteps, self.timestep_cond = unet, tuple(timesteps), timestep_cond
        self._made: dict[float, TimeShifts] = {}

    def __call__(self, t: float) -> TimeShifts | None:
        """One time; None if it is no time of the run, or has to be computed in the call."""
        if t not in self._made:
            unet = self.unet  # optimized while it works, and plain when a run makes its denoiser
            if t not in self.timesteps or not isinstance(unet, OptimizedUNet) or not unet.precomputes_times:
                return None
            start = self.timesteps.index(t)
            coming = self.timesteps[start : start + AT_ONCE]
            cond = None if self.timestep_cond is None else self.timestep_cond.to(unet.device, unet.dtype)
            self._made = dict(zip(coming, unet.precompute_times(coming, cond), strict=True))
        return self._made[t]


def decide(situation: Situation) -> tuple[str, str]:
    if situation.decided["offload"] == "sequential":
        return "per call", LAYER_BY_LAYER
    if situation.workload.unet.conditioned_per_row:
        return (
            "per call",
            "this network adds conditions of each image (a class, or SDXL's pooled prompt and sizes) to them",
        )
    return "precomputed", "they depend on the timestep alone, and not on the image or the prompt"


def apply(network: nn.Module, name: str, choices: Choices, changes: Changes) -> None:
    if name == "unet":
        optimize_blocks(network, changes)
        if isinstance(network, OptimizedUNet) and is_untouched_embedding(network.time_embedding):
            changes.set(network, "precomputes_times", True)


def is_untouched_embedding(embedding: nn.Module) -> bool:
    """Whether nobody watches the layers of the time: who does sees one time in every step."""
    return type(embedding) is TimestepEmbedding and holds_untouched(embedding)


def precomputed_bytes(situation: Situation) -> int:
    """An embedding, and a number for each channel of each residual block, for the times that are computed at once."""
    unet = situation.workload.unet
    outputs = sum(stage.channels for stage in unet.stages if stage.resampling != "down")
    return int(AT_ONCE * (unet.time_features + outputs) * situation.decided.width("unet"))


def footprint(situation: Situation) -> Footprint:
    return replace(OPTIMIZED_UNET, kept=precomputed_bytes(situation))


PASS = Pass(
    name="timestep_embeddings",
    meaning="'precomputed' for all steps of a run before its first, or 'per call'",
    off="per call",
    devices=("mps",),
    elsewhere="a few more small kernels take no time on this device",
    decide=decide,
    apply=apply,
    footprint=footprint,
)
