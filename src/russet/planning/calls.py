"""The attention calls and the largest tensors that the work makes, given what was decided so far."""

from __future__ import annotations

from collections.abc import Iterator

from russet.planning.activations import Attended
from russet.planning.plan_types import TEXT, Decisions
from russet.planning.workload import Workload


def unet_rows(workload: Workload, found: Decisions) -> int:
    """Rows of latents that the UNet sees at once."""
    return min(found.micro_batch, workload.images) * workload.rows


def tile_latents(workload: Workload, found: Decisions) -> tuple[int, int]:
    """Height and width in latents of what the VAE sees at once: a whole picture, or a tile."""
    height, width = workload.latents
    if found.vae_tile is None:
        return height, width
    return min(height, found.vae_tile.size), min(width, found.vae_tile.size)


def unet_calls(workload: Workload, found: Decisions) -> list[Attended]:
    """The UNet's self-attentions, one for each level that has any."""
    u, (height, width) = workload.unet, workload.latents
    calls = []
    for level, heads in enumerate(u.heads):
        if u.attends(level):
            tokens = -(-height // (1 << level)) * -(-width // (1 << level))
            dim = u.channels[level] // heads
            calls.append(Attended(batch=unet_rows(workload, found), heads=heads, queries=tokens, keys=tokens, dim=dim))
    return calls


def vae_call(workload: Workload, found: Decisions) -> Attended:
    """The VAE's one attention, of a single head."""
    height, width = tile_latents(workload, found)
    tokens, images = height * width, min(found.vae_batch, workload.images)
    return Attended(batch=images, heads=1, queries=tokens, keys=tokens, dim=workload.vae.channels[-1])


def text_calls(workload: Workload) -> list[Attended]:
    """The text encoders' attentions, as if all prompts were encoded at once."""
    rows = workload.rows * workload.images
    return [
        Attended(batch=rows, heads=t.heads, queries=t.tokens, keys=t.tokens, dim=t.width // t.heads)
        for t in workload.text
    ]


def attention_calls(component: str, workload: Workload, found: Decisions) -> list[Attended]:
    """The attention calls of ``"unet"``, ``"vae"`` or ``"text_encoder"``."""
    if component == "unet":
        return unet_calls(workload, found)
    if component == "vae":
        return [] if workload.vae.blocks else [vae_call(workload, found)]
    return text_calls(workload)


def largest_tensors(workload: Workload, found: Decisions) -> Iterator[tuple[int, int]]:
    """(numbers, bytes per number) of the tensors that can pass a device's limits."""
    for call in unet_calls(workload, found):
        yield call.scores(found.attention("unet")), 4
        yield call.batch * call.heads * call.queries * TEXT, 4
        yield 8 * call.batch * call.heads * call.dim * call.queries, found.width("unet")  # the gated layer
    call = vae_call(workload, found)
    if not workload.vae.blocks:
        yield call.scores(found.attention("vae")), 4
    v, area = workload.vae, call.batch * call.queries * workload.vae.factor**2
    above = v.channels[1] if len(v.channels) > 1 else v.channels[0]
    yield above * area, found.width("vae")  # the last level's input
