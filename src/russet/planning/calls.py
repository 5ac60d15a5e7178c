"""The attention calls and the largest tensors that the work makes, given what was decided so far."""

from __future__ import annotations

from collections.abc import Iterator

from russet.planning.activations import Attended
from russet.planning.decisions import Decisions
from russet.planning.plan_types import TEXT
from russet.planning.workload import Sizes


def unet_rows(sizes: Sizes, found: Decisions) -> int:
    """Rows of latents that the UNet sees at once."""
    return min(found.micro_batch, sizes.images) * sizes.rows


def tile_latents(sizes: Sizes, found: Decisions) -> tuple[int, int]:
    """Height and width in latents of what the VAE sees at once: a whole picture, or a tile."""
    height, width = sizes.latents
    if found.vae_tile is None:
        return height, width
    return min(height, found.vae_tile.size), min(width, found.vae_tile.size)


def unet_calls(sizes: Sizes, found: Decisions) -> list[Attended]:
    """The UNet's self-attentions, one for each level that has any."""
    u, (height, width) = sizes.unet, sizes.latents
    calls = []
    for level, heads in enumerate(u.heads):
        if u.attends(level):
            tokens = -(-height // (1 << level)) * -(-width // (1 << level))
            dim = u.channels[level] // heads
            calls.append(Attended(batch=unet_rows(sizes, found), heads=heads, queries=tokens, keys=tokens, dim=dim))
    return calls


def vae_call(sizes: Sizes, found: Decisions) -> Attended:
    """The VAE's one attention, of a single head."""
    height, width = tile_latents(sizes, found)
    tokens, images = height * width, min(found.vae_batch, sizes.images)
    return Attended(batch=images, heads=1, queries=tokens, keys=tokens, dim=sizes.vae.channels[-1])


def text_calls(sizes: Sizes) -> list[Attended]:
    """The text encoders' attentions, as if all prompts were encoded at once."""
    rows = sizes.rows * sizes.images
    return [
        Attended(batch=rows, heads=t.heads, queries=t.tokens, keys=t.tokens, dim=t.width // t.heads) for t in sizes.text
    ]


def attention_calls(component: str, sizes: Sizes, found: Decisions) -> list[Attended]:
    """The attention calls of ``"unet"``, ``"vae"`` or ``"text_encoder"``."""
    if component == "unet":
        return unet_calls(sizes, found)
    if component == "vae":
        return [] if sizes.vae.blocks else [vae_call(sizes, found)]
    return text_calls(sizes)


def largest_tensors(sizes: Sizes, found: Decisions) -> Iterator[tuple[int, int]]:
    """(numbers, bytes per number) of the tensors that can pass a device's limits."""
    for call in unet_calls(sizes, found):
        yield call.scores(found.attention("unet")), 4
        yield call.batch * call.heads * call.queries * TEXT, 4
        yield 8 * call.batch * call.heads * call.dim * call.queries, found.width("unet")  # the gated layer
    call = vae_call(sizes, found)
    if not sizes.vae.blocks:
        yield call.scores(found.attention("vae")), 4
    v, area = sizes.vae, call.batch * call.queries * sizes.vae.factor**2
    above = v.channels[1] if len(v.channels) > 1 else v.channels[0]
    yield above * area, found.width("vae")  # the last level's input
