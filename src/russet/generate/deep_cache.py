"""Deep features kept from step to step: DeepCache (arXiv:2312.00858).

What the UNet computes far from its ends changes little between neighbouring steps. So the whole UNet works in every
``interval``-th call only; in the calls between, its outermost blocks start from the deep map of the last whole call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from russet.generate.engine import Predict
from russet.models.unet import UNet2DConditionModel
from russet.residency.streaming import is_streaming

LEFT_OUT = (
    "the deep cache was left out: somebody has hooked, wrapped or compiled the UNet, so every call of it is a whole one"
)


@dataclass(frozen=True)
class DeepCache:
    """How much work is left out.

    interval: of so many calls in a row one computes everything; 1 leaves nothing out.
    branch: which of the UNet's skip connections is the innermost that is computed in the others; 0 is the outermost.
    start: the part of the noise schedule, 0..1, in which all calls are whole: the picture's layout is made there.
    last_timestep: the noisiest timestep, at 0 of the schedule.
    """

    interval: int
    branch: int
    start: float
    last_timestep: float = 999

    def may_reuse(self, t: float) -> bool:
        """Whether a call at this timestep may start from an older map."""
        return t <= (1 - self.start) * self.last_timestep


class DeepCall(Protocol):
    """The UNet with its conditioning: (output, deep map) as ``from_deep_map`` has it, output float32."""

    def __call__(
        self, x: Tensor, t: float, deep_branch: int | None = None, deep_map: Tensor | None = None
    ) -> tuple[Tensor, ...]: ...


def must_be_whole(unet: nn.Module) -> bool:
    """Whether a call of a UNet is more than its stages: somebody has hooked, wrapped, compiled or subclassed it."""
    own, hooks = vars(unet), (*unet._forward_pre_hooks.values(), *unet._forward_hooks.values())
    if "forward" in own or own.get("_compiled_call_impl") is not None or not all(map(is_streaming, hooks)):
        return True
    return getattr(type(unet), "forward", None) is not UNet2DConditionModel.forward


def from_deep_map(
    unet: UNet2DConditionModel, x: Tensor, emb: Any, context: Any, branch: int, deep_map: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The UNet's output, and the map that enters the output stage of a branch (section 3.2); 0 is the outermost.

    With the map of an earlier call only the stages outside of it are computed.
    """
    start = len(unet.output_stages) - 1 - branch
    if deep_map is None:
        skips = unet.down(x, emb, context)
        deep_map = unet.up(unet.middle(skips[-1], emb, context), skips, emb, context, stop=start)
    else:
        skips = unet.down(x, emb, context, count=branch + 1)
    return unet.head(unet.up(deep_map, skips, emb, context, start=start)), deep_map


def deep_cached(call: DeepCall, cache: DeepCache) -> Predict:
    """A denoiser that remembers its last deep map, for one run on the same rows. Its first call is whole."""
    reused = 0
    kept: Tensor | None = None

    def predict(x: Tensor, t: float) -> Tensor:
        nonlocal reused, kept
        if reused + 1 >= cache.interval or not cache.may_reuse(t):
            kept = None  # before the new one is made: both together would need more memory
        reused = 0 if kept is None else reused + 1
        output, kept = call(x, t, cache.branch, kept)
        return output

    return predict
