"""Ways of doing the work, from the fastest to the most frugal, and the first of them that fits."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from russet.hardware.facts import Facts
from russet.planning.attention_choice import LEAST_ROOM, Caps, choose_attention, slicing_asked
from russet.planning.calls import attention_calls, largest_tensors
from russet.planning.decisions import Decision, Decisions, gigabytes, settled
from russet.planning.device_defaults import dtype_decisions, idle_weights, machine_decisions
from russet.planning.fast_paths import fast_paths
from russet.planning.memory import Estimate, predict, resident
from russet.planning.parameters import counts
from russet.planning.plan_types import SMALL_TILE, TILE, Request, Tile
from russet.planning.workload import Sizes

AT_ONCE = {"mps": 4, "cuda": 16, "cpu": 4}  # images of 512×512 in one UNet call: enough to keep the device busy
DECODED = {"mps": 1, "cuda": 4, "cpu": 1}  # the same of the VAE, whose maps are far larger
SHARE = {"mps": 0.5, "cuda": 1.0, "cpu": 0.25}  # of the budget that more than one image at a time may fill
UNIT = 512 * 512
LARGE_TEXT = 2**25  # parameters of text encoders from which dropping them is worth reading them for every prompt


class Rung(NamedTuple):
    """What is varied from one way of doing the work to the next."""

    micro_batch: int
    vae_batch: int = 1
    vae_tile: Tile | None = None
    text_encoder: str = "device"
    offload: str | None = None


def best(facts: Facts, sizes: Sizes, request: Request) -> tuple[Decisions, Estimate] | None:
    """The fastest way that stays within what is free now; else the most frugal one that the device's limit allows.

    Small tiles show in the picture, so they are taken only where nothing else is within the limit.
    """
    usual, resort = rungs(facts, sizes, request)
    return fitting(facts, sizes, request, usual) or fitting(facts, sizes, request, resort)


def fitting(facts: Facts, sizes: Sizes, request: Request, ladder: Iterable[Rung]) -> tuple[Decisions, Estimate] | None:
    """The first way within the budget, else the one with the least peak within the limit, else None."""
    frugal: tuple[Decisions, Estimate] | None = None
    for found, estimate in ways(facts, sizes, request, ladder):
        if not within_caps(facts, sizes, found):
            continue
        several = found.micro_batch > 1 and found.why("micro_batch").by == "plan"
        if estimate.peak <= facts.budget * (SHARE[facts.device] if several else 1):
            return found, estimate
        if frugal is None or estimate.peak <= frugal[1].peak:
            frugal = found, estimate
    return frugal if frugal and frugal[1].peak <= facts.limit else None


def ways(facts: Facts, sizes: Sizes, request: Request, ladder: Iterable[Rung]) -> Iterator[tuple[Decisions, Estimate]]:
    """Each rung as decisions with their estimate. The user's choices hold in all of them."""
    reason, seen = f"only {gigabytes(facts.limit)} are there for it", set()
    for rung in ladder:
        held = Rung(*(request.user.get(name, value) for name, value in rung._asdict().items()))
        if held in seen:
            continue
        seen.add(held)
        found = decide(facts, sizes, request, rung, reason)
        estimate = predict(sizes, found)
        yield found, estimate
        reason = f"otherwise {gigabytes(estimate.peak)} would be needed, and {gigabytes(facts.budget)} are free"


def rungs(facts: Facts, sizes: Sizes, request: Request) -> tuple[list[Rung], list[Rung]]:
    """The usual ladder (fewer images at a time, tiles, weights there only while needed), and the last resort.

    Decoding one at a time comes first: it costs little, and is no longer the widest moment then.
    """
    parts = equal_parts(sizes.images, images_at_once(AT_ONCE, facts, sizes))
    text = "freed" if text_is_spare(facts, sizes, request) else "device"
    ladder = [Rung(parts[0], decoded(facts, sizes), text_encoder=text), *(Rung(n, text_encoder=text) for n in parts)]
    if max(sizes.latents) > TILE.size:
        ladder.append(Rung(1, vae_tile=TILE))
    last = ladder[-1]
    if facts.device == "cuda":
        ladder += [last._replace(offload="model"), last._replace(offload="sequential")]
    elif request.rereadable:
        ladder += [last._replace(text_encoder="freed"), last._replace(offload="model")]
    return ladder, [rung._replace(vae_tile=SMALL_TILE) for rung in ladder if rung.micro_batch == 1]


def text_is_spare(facts: Facts, sizes: Sizes, request: Request) -> bool:
    """Whether the text encoder is better read again for every prompt: on a CPU that is little beside the picture."""
    free = request.rereadable and request.unnoticed
    return facts.device == "cpu" and free and counts(sizes)["text_encoder"] >= LARGE_TEXT


def images_at_once(usual: Mapping[str, int], facts: Facts, sizes: Sizes) -> int:
    """How many images of this size are as much work as ``usual`` has of 512×512."""
    return usual[facts.device] * UNIT // (sizes.width * sizes.height)


def decoded(facts: Facts, sizes: Sizes) -> int:
    """How many images the VAE decodes at once, where there is room."""
    return equal_parts(sizes.images, images_at_once(DECODED, facts, sizes))[0]


def equal_parts(images: int, most: int) -> list[int]:
    """Sizes of equal parts of the images, the largest first, none above ``most``: parts of one size keep one shape."""
    return [n for n in range(images, 1, -1) if images % n == 0 and n <= most] + [1]


def least_peak(facts: Facts, sizes: Sizes, request: Request) -> int:
    """Bytes of the most frugal way there is, whether it fits or not."""
    usual, resort = rungs(facts, sizes, request)
    return min(estimate.peak for _, estimate in ways(facts, sizes, request, [*usual, *resort]))


def decide(facts: Facts, sizes: Sizes, request: Request, rung: Rung, reason: str) -> Decisions:
    """A rung as decisions, with the attention that suits it. ``reason`` says why it is not the rung above."""
    user, start = request.user, Rung(1)
    one = "one at a time takes the least memory" if sizes.images > 1 else "there is one"

    def pick(name: str, value: object, usual: object, plain: str) -> Decision:
        return settled(user, name, value, plain if value == usual else reason)

    found = Decisions(
        decisions=(
            *dtype_decisions(facts, sizes, request),
            settled(user, "micro_batch", rung.micro_batch, "as many as fit" if rung.micro_batch > 1 else one),
            pick("vae_batch", rung.vae_batch, decoded(facts, sizes), "decoding is the widest moment"),
            pick("vae_tile", rung.vae_tile, start.vae_tile, "a picture of this size fits as a whole"),
            text_encoder(facts, sizes, request, rung, reason),
            pick("offload", rung.offload, start.offload, "there is room for everything"),
            idle_weights(facts, request),
            *machine_decisions(facts, request),
        )
    )
    found = found.and_also(fast_paths(facts, sizes, request, found))
    return found.and_also(attention_decisions(facts, sizes, request, found))


def text_encoder(facts: Facts, sizes: Sizes, request: Request, rung: Rung, reason: str) -> Decision:
    if rung.text_encoder == "device":
        reason = "there is room for it"
    elif text_is_spare(facts, sizes, request):
        reason = "nobody has looked at it, and to read it again takes a moment beside drawing on a CPU"
    return settled(request.user, "text_encoder", rung.text_encoder, reason)


def attention_decisions(facts: Facts, sizes: Sizes, request: Request, found: Decisions) -> list[Decision]:
    """Attention for each component; scores may take a third of what the weights leave free."""
    weights = max(resident(sizes, found, ("denoise", "decode")).values())
    room = max(LEAST_ROOM, (facts.budget - weights) // 3)
    decisions = []
    for component in ("unet", "vae", "text_encoder"):
        name, made = f"attention.{component}", attention_calls(component, sizes, found)
        overflows = component == "unet" and sizes.unet.upcast
        if component == "unet" and request.attention_slicing is not None:
            asked = slicing_asked(facts, found.dtype(component), made, request.attention_slicing, overflows)
            decisions.append(Decision(name, *asked, by="user"))
        else:
            decisions.append(Decision(name, *choose_attention(facts, found.dtype(component), made, room, overflows)))
    return decisions


def within_caps(facts: Facts, sizes: Sizes, found: Decisions) -> bool:
    """Whether no tensor passes the device's limits."""
    caps = Caps.of(facts)
    return all(caps.allow(numbers, width) for numbers, width in largest_tensors(sizes, found))


def largest_fit(facts: Facts, sizes: Sizes, request: Request) -> tuple[int, int] | None:
    """Width and height, multiples of 64, of the largest picture of about that shape that fits; None if none does."""
    longest = max(sizes.width, sizes.height)

    def of_side(side: int) -> tuple[int, int]:
        width, height = (max(1, round(edge * side / longest)) * 64 for edge in (sizes.width, sizes.height))
        return width, height

    def fits(side: int) -> bool:
        width, height = of_side(side)
        return best(facts, dataclasses.replace(sizes, width=width, height=height), request) is not None

    # in units of 64 pixels; where a size fits, all smaller ones do
    most = bisect.bisect_left(range(1, longest // 64 + 1), True, key=lambda side: not fits(side))
    return of_side(most) if most else None
