"""Wrappers of ``Predict``: what changes how the denoiser is called, and nothing else."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from russet.devices.choices import TEXT
from russet.devices.plan import Plan
from russet.models.resnet import Time
from russet.models.text import Text
from russet.models.unet import UNet2DConditionModel
from russet.pipelines.deep_cache import DeepCache, UNetCall, deep_cached, plain
from russet.pipelines.engine import Predict
from russet.pipelines.graphs import Graphs, identity
from russet.pipelines.times import Times

ALWAYS = (0.0, math.inf)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv:2207.12598).

    scale: how far to go from the unconditional towards the conditional answer; 1 and below is no guidance.
    rescale: 0..1, how much of the guided answer's contrast is set back (arXiv:2305.08891, section 3.4).
    both: whether the solver needs the answer without the prompt as well (CFG++, arXiv:2406.08070).
    times: the lowest and the highest timestep that the model is guided at (arXiv:2404.07724); at others it is asked
        with the prompt alone, and that answer is taken.
    """

    scale: float = 7.5
    rescale: float = 0.0
    both: bool = False
    times: tuple[float, float] = ALWAYS

    @property
    def wanted(self) -> bool:
        return self.scale > 1 or self.both

    def guides(self, t: float) -> bool:
        """Whether the model is guided at a timestep."""
        return self.times[0] <= t <= self.times[1]


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told besides the latents.

    positive: [B, N, D], the encoded prompts.
    negative: [B, N, D], the encoded negative prompts; None leaves guidance out.
    """

    positive: Tensor
    negative: Tensor | None = None

    @property
    def joined(self) -> Tensor:
        """[2B, N, D] with the negative half first, or [B, N, D] without guidance."""
        return self.positive if self.negative is None else torch.cat([self.negative, self.positive])

    @property
    def alone(self) -> Conditioning:
        """The same without a negative half."""
        return Conditioning(self.positive)

    def rows(self, start: int, stop: int) -> Conditioning:
        """The part that belongs to some of the images."""
        return Conditioning(self.positive[start:stop], None if self.negative is None else self.negative[start:stop])

    def repeated(self, times: int) -> Conditioning:
        """Each row ``times`` times in a row: several images of one prompt."""
        if times == 1:
            return self

        def each(x: Tensor) -> Tensor:  # mps has no repeat_interleave before torch 2.0
            return x[:, None].expand(-1, times, -1, -1).flatten(0, 1)

        return Conditioning(each(self.positive), None if self.negative is None else each(self.negative))


def predictor(
    unet: UNet2DConditionModel,
    conditioning: Conditioning,
    guidance: Guidance,
    plan: Plan,
    graphs: Graphs | None = None,
    cache: DeepCache | None = None,
    timesteps: Sequence[float] = (),
) -> Predict:
    """The denoiser of one run: guided where there is a negative half, as many images to a call as the plan says.

    timesteps: those to come, where the plan has the UNet told of them beforehand.

    Where guidance pauses a call has one row for each image and not two, and so may take twice as many images.
    """
    graphs = graphs if plan["graphs"] else None
    width = unet.config.time_cond_proj_dim
    told = None if width is None else guidance_embedding(guidance.scale, width)
    times = Times(unet, timesteps, told) if plan["times"] == "ahead" else None

    def of(told: Conditioning, at_once: int) -> Predict:
        starts = range(0, len(told.positive), at_once)
        return micro_batched([part(told.rows(start, start + at_once)) for start in starts], at_once)

    def part(rows: Conditioning) -> Predict:
        call = unet_call(unet, rows.joined, told, text_keys=plan["text_keys"], graphs=graphs, times=times)
        bare = plain(call) if cache is None else deep_cached(call, cache)
        if rows.negative is not None:
            return guided(bare, guidance)
        return in_both_places(bare) if guidance.both else bare

    if conditioning.negative is None or guidance.times == ALWAYS:
        return of(conditioning, plan.micro_batch)
    return within(
        guidance.guides,
        lambda: of(conditioning, plan.micro_batch),
        lambda: of(conditioning.alone, 2 * plan.micro_batch),
    )


def unet_call(
    unet: UNet2DConditionModel,
    context: Tensor,
    told: Tensor | None = None,
    *,
    text_keys: str = "each call",
    graphs: Graphs | None = None,
    times: Callable[[float], Time | None] | None = None,
) -> UNetCall:
    """The UNet of B rows with its conditioning [k·B, N, D]: k·B rows. Works in its own precision, answers in float32.

    told: the vector [1, D] that a distilled UNet is told with the time.

    ``text_keys``: what is kept from the first call on of what every layer makes of the text, in the plan's words.
    ``graphs``: calls are recorded there, and replayed. ``times``: what is known of times that were told beforehand.
    """
    context = context.to(unet.dtype)
    told = None if told is None else told.to(context).expand(len(context), -1)

    @functools.cache  # at the first call, when the UNet is where it works
    def prepared() -> tuple[Text, Hashable | None]:
        absorbed = text_keys == "absorbed" and context.shape[1] <= TEXT  # of more words the plan does not know
        if text_keys == "each call":
            text = Text(context)
        else:
            text = unet.read(context, absorbed=absorbed, together=text_keys == "kept together")
        return text, None if graphs is None else identity(unet)

    def call(
        x: Tensor, t: float, *, deep_branch: int | None = None, deep_map: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        text, name = prepared()
        known = None if times is None else times(t)
        if known is not None:
            return called(x, known, text, None, deep_branch, deep_map)
        if graphs is None or name is None:
            return called(x, t, text, told, deep_branch, deep_map)
        optional = [tensor for tensor in (told, deep_map) if tensor is not None]

        def recordable(x: Tensor, t: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            left = iter(rest)
            scale, deep = (None if tensor is None else next(left) for tensor in (told, deep_map))
            return called(x, t, text.of(tuple(left)), scale, deep_branch, deep)

        inputs = [x, torch.full((1,), t, dtype=torch.float32, device=x.device), *optional, *text.tensors()]
        return graphs.run((name, deep_branch, deep_map is None), recordable, inputs)

    def called(
        x: Tensor, t: float | Tensor | Time, text: Text, told: Tensor | None, branch: int | None, deep: Tensor | None
    ) -> tuple[Tensor, ...]:
        output, *kept = unet(
            x.to(unet.dtype), t, text, timestep_cond=told, deep_branch=branch, deep_map=deep, return_dict=False
        )
        return output.float(), *kept

    return call


def within(guides: Callable[[float], bool], inside: Callable[[], Predict], outside: Callable[[], Predict]) -> Predict:
    """One denoiser for the times that ``guides`` names, another one for all others.

    Each is made when its times begin: what a denoiser remembers from step to step must not outlive a pause.
    """
    here: bool | None = None
    current: Predict

    def predict(x: Tensor, t: float) -> Tensor:
        nonlocal here, current
        if guides(t) != here:
            here = guides(t)
            current = inside() if here else outside()
        return current(x, t)

    return predict


def in_both_places(bare: Predict) -> Predict:
    """For solvers that want the answer without the prompt too, where there is no guidance: the same one twice."""
    return lambda x, t: torch.cat([bare(x, t)] * 2, dim=1)


def guided(pair: Predict, guidance: Guidance) -> Predict:
    """Classifier-free guidance around a denoiser that answers B rows for 2B texts, the negative half first."""

    def predict(x: Tensor, t: float) -> Tensor:
        without, with_prompt = pair(x, t).chunk(2)
        output = torch.add(without, with_prompt - without, alpha=guidance.scale)
        if guidance.rescale > 0:
            output = rescaled(output, with_prompt, guidance.rescale)
        return torch.cat([output, without], dim=1) if guidance.both else output

    return predict


def rescaled(output: Tensor, with_prompt: Tensor, rescale: float) -> Tensor:
    """Sets each image's deviation back towards that of the answer with the prompt (arXiv:2305.08891, eq. 15–16)."""
    axes = tuple(range(1, output.dim()))
    same_deviation = output * (with_prompt.std(dim=axes, keepdim=True) / output.std(dim=axes, keepdim=True))
    return rescale * same_deviation + (1 - rescale) * output


def micro_batched(parts: Sequence[Predict], rows: int) -> Predict:
    """One denoiser out of several that each know ``rows`` of the images (the last one perhaps fewer).

    The latents of all images stay together, so the pictures are those of one large batch.
    """
    if len(parts) == 1:
        return parts[0]
    return lambda x, t: torch.cat([part(piece, t) for part, piece in zip(parts, torch.split(x, rows), strict=True)])


def guidance_embedding(scale: float, width: int) -> Tensor:
    """[1, width]: the guidance scale as a distilled UNet is told it (arXiv:2310.04378, section 4.2).

    A sinusoidal embedding of 1000 × (scale − 1), sines first, frequencies from 1 to 1/10000.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device="cpu") * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (scale - 1.0) * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))[None]
