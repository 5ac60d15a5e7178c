"""The times of a run, told to the UNet before they come: what it makes of one is the same for all pictures."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from russet.models.resnet import Time
from russet.models.unet import UNet2DConditionModel
from russet.planning.memory import PRECOMPUTED as AT_ONCE


class Times:
    """Times as a UNet's residual blocks take them, computed ``AT_ONCE`` together when the first of them comes.

    told: the vector [1, D] that a distilled UNet is told with each of them.
    """

    def __init__(self, unet: UNet2DConditionModel, timesteps: Sequence[float], told: Tensor | None = None) -> None:
        self.unet, self.timesteps, self.told = unet, tuple(timesteps), told
        self._made: dict[float, Time] = {}

    def __call__(self, t: float) -> Time | None:
        """One time; None if it is no time of the run."""
        if t not in self._made:
            if t not in self.timesteps:
                return None
            start = self.timesteps.index(t)
            coming = self.timesteps[start : start + AT_ONCE]
            told = None if self.told is None else self.told.to(self.unet.device, self.unet.dtype)
            self._made = dict(zip(coming, self.unet.tell(coming, told), strict=True))
        return self._made[t]
