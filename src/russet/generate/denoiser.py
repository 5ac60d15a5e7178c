"""The denoiser of one run: a UNet with its conditioning, as a function of noisy latents and a timestep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from russet.backends.blocks.inputs import Context, TimeShifts
from russet.backends.blocks.unet import OptimizedUNet
from russet.backends.cuda.graphs import Graphs, identity
from russet.backends.ops import repeated_rows
from russet.generate.conditioning import Conditioning, Rows
from russet.generate.deep_cache import DeepCache, deep_cached, from_deep_map
from russet.generate.engine import Predict
from russet.generate.guidance import ALWAYS, Guidance, guidance_embedding, guided, in_interval, unguided_twice
from russet.models.unet import UNet2DConditionModel
from russet.passes.prompt_cache import PromptCache, cached_prompt
from russet.passes.timestep_embeddings import TimestepCache
from russet.planning.plan import Plan

ADDED = ("text_embeds", "time_ids")  # conditioning that UNet2DConditionModel takes by added_cond_kwargs


def build_denoiser(
    unet: UNet2DConditionModel,
    conditioning: Conditioning,
    guidance: Guidance,
    plan: Plan,
    graphs: Graphs | None = None,
    cache: DeepCache | None = None,
    timesteps: Sequence[float] = (),
) -> Predict:
    """The denoiser of one run: guided where there is a negative half, with as many images in a call as the plan says.

    timesteps: those to come, where the plan has their embeddings computed beforehand.

    Where guidance pauses, a call has one row for each image and not two, and so may take twice as many images.
    """
    graphs = graphs if plan["cuda_graphs"] else None
    width = unet.config.time_cond_proj_dim
    if width is not None:
        conditioning = conditioning.extended(
            timestep_cond=guidance_embedding(guidance.scale, width).expand(len(conditioning), -1)
        )
    scale = conditioning.positive.get("timestep_cond")
    times = None
    if plan["timestep_embeddings"] == "precomputed":
        times = TimestepCache(unet, timesteps, None if scale is None else scale[:1])

    def of(conditions: Conditioning, at_once: int) -> Predict:
        starts = range(0, len(conditions), at_once)
        return micro_batched([part(conditions.rows(start, start + at_once)) for start in starts], at_once)

    def part(conditions: Conditioning) -> Predict:
        call = UNetCall(unet, conditions.joined, prompt_cache=plan["prompt_cache"], graphs=graphs, times=times)
        predict = call if cache is None else deep_cached(call.with_deep_map, cache)
        if conditions.negative is not None:
            return guided(predict, guidance)
        return unguided_twice(predict) if guidance.both else predict

    if conditioning.negative is None or guidance.times == ALWAYS:
        return of(conditioning, plan.micro_batch)
    return in_interval(
        guidance.guides,
        lambda: of(conditioning, plan.micro_batch),
        lambda: of(conditioning.without_negative, 2 * plan.micro_batch),
    )


class UNetCall:
    """The UNet with the conditioning of B images, as k·B rows: called, it takes latents [B, C, h, w] at a timestep.

    Computes in the UNet's own precision and returns float32, [k·B, C, h, w].

    prompt_cache: what is kept of the prompt from the first call on, one of the values of the plan's decision.
    graphs: calls are recorded there, and replayed.
    times: gives the precomputed embeddings of a timestep, or None where it has none.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        rows: Rows,
        *,
        prompt_cache: str = "off",
        graphs: Graphs | None = None,
        times: Callable[[float], TimeShifts | None] | None = None,
    ) -> None:
        self.unet, self.prompt_cache, self.graphs, self.times = unet, prompt_cache, graphs, times
        device, dtype = rows["encoder_hidden_states"].device, unet.dtype
        self.context = rows["encoder_hidden_states"].to(dtype)
        # Time ids keep their precision: Diffusers rounds them to the network's, which moves large sizes by pixels.
        self.others = {
            name: tensor.to(device, torch.float32 if name == "time_ids" else dtype)
            for name, tensor in rows.items()
            if name != "encoder_hidden_states"
        }

    @functools.cached_property  # at the first call, when the UNet is on its device
    def text(self) -> Tensor | Context:
        return cached_prompt(self.unet, self.context, self.prompt_cache)

    @functools.cached_property
    def recorded_as(self) -> Hashable | None:
        """What tells recordings of this call apart; None where it must not be recorded."""
        return None if self.graphs is None else identity(self.unet)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return self.with_deep_map(x, t)[0]

    def with_deep_map(
        self, x: Tensor, t: float, deep_branch: int | None = None, deep_map: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """(output,), or with a branch (output, deep map); see ``from_deep_map``."""
        known = None if self.times is None else self.times(t)
        if known is not None:
            return self._run(x, known, self.text, {}, deep_branch, deep_map)
        if self.recorded_as is None:
            return self._run(x, t, self.text, self.others, deep_branch, deep_map)
        return self._replayed(x, t, deep_branch, deep_map)

    def _replayed(self, x: Tensor, t: float, branch: int | None, deep_map: Tensor | None) -> tuple[Tensor, ...]:
        text, names = self.text, [*self.others]
        deep = [] if deep_map is None else [deep_map]

        def recordable(x: Tensor, t: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            left = iter(rest)
            others = {name: next(left) for name in names}
            deep_map = next(left) if deep else None
            return self._run(x, t, with_tensors(text, tuple(left)), others, branch, deep_map)

        time = torch.full((1,), t, dtype=torch.float32, device=x.device)
        inputs = [x, time, *self.others.values(), *deep, *tensors_of(text)]
        assert self.graphs is not None
        return self.graphs.run((self.recorded_as, branch, deep_map is None), recordable, inputs)

    def _run(
        self,
        x: Tensor,
        t: float | Tensor | TimeShifts,
        text: Tensor | Context,
        others: Rows,
        branch: int | None,
        deep_map: Tensor | None,
    ) -> tuple[Tensor, ...]:
        unet, added = self.unet, {name: others[name] for name in ADDED if name in others}
        conditions: dict[str, Any] = {"timestep_cond": others.get("timestep_cond"), "added_cond_kwargs": added or None}
        x = x.to(unet.dtype)
        if not isinstance(unet, OptimizedUNet):
            x = repeated_rows(x, len(self.context))
        if branch is None:
            return (unet(x, t, text, **conditions, return_dict=False)[0].float(),)
        emb = unet.embed(x, cast(Any, t), class_labels=None, **conditions)
        output, deep_map = from_deep_map(unet, x, emb, text, branch, deep_map)
        return output.float(), deep_map


def tensors_of(text: Tensor | Context) -> list[Tensor]:
    """What of a text a recording reads."""
    return text.tensors() if isinstance(text, PromptCache) else [text.tensor if isinstance(text, Context) else text]


def with_tensors(text: Tensor | Context, tensors: Sequence[Tensor]) -> Tensor | Context:
    """The same text, of other tensors in the order of ``tensors_of``."""
    return text.with_tensors(tensors) if isinstance(text, PromptCache) else tensors[0]


def micro_batched(parts: Sequence[Predict], rows: int) -> Predict:
    """One denoiser out of several that each have ``rows`` of the images (the last one perhaps fewer).

    The latents of all images stay together, so the pictures are those of one large batch.
    """
    if len(parts) == 1:
        return parts[0]
    return lambda x, t: torch.cat([part(piece, t) for part, piece in zip(parts, torch.split(x, rows), strict=True)])
