"""Strategies from the fastest to the one that needs the least memory, and the first of them that fits."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from russet.hardware.facts import Facts, gigabytes
from russet.planning.attention_choice import LEAST_ROOM, Caps, choose_attention, slicing_asked
from russet.planning.device_defaults import dtype_decisions, machine_decisions, offload_target
from russet.planning.fast_paths import fast_paths
from russet.planning.memory import Estimate, attention_calls, largest_tensors, predict, resident
from russet.planning.plan_types import SMALL_TILE, TILE, Decision, Decisions, Request, Tile, resolve
from russet.planning.workload import Workload

UNET_BATCH = {"mps": 4, "cuda": 16, "cpu": 4}  # images of 512×512 in one UNet call: enough to keep the device busy
VAE_BATCH = {"mps": 1, "cuda": 4, "cpu": 1}  # the same of the VAE, whose feature maps are far larger
SHARE = {"mps": 0.5, "cuda": 1.0, "cpu": 0.25}  # of the budget that more than one image at a time may fill
UNIT = 512 * 512
LARGE_TEXT_ENCODER = 2**25  # parameters from which unloading text encoders is worth reading them for every prompt


class Strategy(NamedTuple):
    """What differs from one strategy to the next."""

    micro_batch: int
    vae_batch: int = 1
    vae_tile: Tile | None = None
    text_encoder: str = "device"
    offload: str | None = None


def best(facts: Facts, workload: Workload, request: Request) -> tuple[Decisions, Estimate] | None:
    """The fastest strategy that stays within what is free now; else the smallest that the device's limit allows.

    Small tiles show in the picture, so they are used only where nothing else is within the limit.
    """
    usual, last_resort = strategies(facts, workload, request)
    return fitting(facts, workload, request, usual) or fitting(facts, workload, request, last_resort)


def fitting(
    facts: Facts, workload: Workload, request: Request, candidates: Iterable[Strategy]
) -> tuple[Decisions, Estimate] | None:
    """The first strategy within the budget, else the one with the least peak within the limit, else None."""
    smallest: tuple[Decisions, Estimate] | None = None
    for found, estimate in evaluated(facts, workload, request, candidates):
        if not within_caps(facts, workload, found):
            continue
        several = found.micro_batch > 1 and found.why("micro_batch").by == "plan"
        if estimate.peak <= facts.budget * (SHARE[facts.device] if several else 1):
            return found, estimate
        if smallest is None or estimate.peak <= smallest[1].peak:
            smallest = found, estimate
    return smallest if smallest and smallest[1].peak <= facts.limit else None


def evaluated(
    facts: Facts, workload: Workload, request: Request, candidates: Iterable[Strategy]
) -> Iterator[tuple[Decisions, Estimate]]:
    """Each strategy as decisions with their estimate. The user's choices hold in all of them."""
    reason, seen = f"the device has only {gigabytes(facts.limit)}", set()
    for strategy in candidates:
        held = Strategy(*(request.user.get(name, value) for name, value in strategy._asdict().items()))
        if held in seen:
            continue
        seen.add(held)
        found = decide(facts, workload, request, strategy, reason)
        estimate = predict(facts, workload, request, found)
        yield found, estimate
        reason = f"otherwise {gigabytes(estimate.peak)} would be needed, and {gigabytes(facts.budget)} are free"


def strategies(facts: Facts, workload: Workload, request: Request) -> tuple[list[Strategy], list[Strategy]]:
    """The usual strategies (fewer images at a time, tiles, offloading), and those of last resort.

    Decoding one at a time comes first: it costs little, and decoding does not take the most memory then.
    """
    parts = equal_parts(workload.images, images_at_once(UNET_BATCH, facts, workload))
    text = "unloaded" if unloads_text_encoder(facts, workload, request) else "device"
    usual = [
        Strategy(parts[0], default_vae_batch(facts, workload), text_encoder=text),
        *(Strategy(n, text_encoder=text) for n in parts),
    ]
    if max(workload.latents) > TILE.size:
        usual.append(Strategy(1, vae_tile=TILE))
    last = usual[-1]
    if facts.device == "cuda":
        usual += [last._replace(offload="model"), last._replace(offload="sequential")]
    elif request.reloadable:
        usual += [last._replace(text_encoder="unloaded"), last._replace(offload="model")]
    return usual, [strategy._replace(vae_tile=SMALL_TILE) for strategy in usual if strategy.micro_batch == 1]


def unloads_text_encoder(facts: Facts, workload: Workload, request: Request) -> bool:
    """Whether the text encoder is read again for every prompt: on a CPU that takes little time beside the denoising."""
    allowed = request.reloadable and request.text_encoder_exclusive
    return facts.device == "cpu" and allowed and workload.parameters.get("text_encoder", 0) >= LARGE_TEXT_ENCODER


def images_at_once(usual: Mapping[str, int], facts: Facts, workload: Workload) -> int:
    """How many images of this size are as much work as ``usual`` has of 512×512."""
    return usual[facts.device] * UNIT // (workload.width * workload.height)


def default_vae_batch(facts: Facts, workload: Workload) -> int:
    """How many images the VAE decodes at once, where there is room."""
    return equal_parts(workload.images, images_at_once(VAE_BATCH, facts, workload))[0]


def equal_parts(images: int, most: int) -> list[int]:
    """Sizes of equal parts of the images, the largest first, none above ``most``: parts of one size keep one shape."""
    return [n for n in range(images, 1, -1) if images % n == 0 and n <= most] + [1]


def least_peak(facts: Facts, workload: Workload, request: Request) -> int:
    """Bytes of the strategy that needs the least, whether it fits or not."""
    usual, last_resort = strategies(facts, workload, request)
    return min(estimate.peak for _, estimate in evaluated(facts, workload, request, [*usual, *last_resort]))


def decide(facts: Facts, workload: Workload, request: Request, strategy: Strategy, reason: str) -> Decisions:
    """A strategy as decisions, with the attention that suits it. ``reason`` says why none of those before it fits."""
    user, start = request.user, Strategy(1)
    one = "one image at a time takes the least memory" if workload.images > 1 else "there is one image"

    def pick(name: str, value: object, usual: object, plain: str) -> Decision:
        return resolve(user, name, value, plain if value == usual else reason)

    batch_reason = "as many images as fit" if strategy.micro_batch > 1 else one
    found = Decisions(
        decisions=(
            *dtype_decisions(facts, workload, request),
            resolve(user, "micro_batch", strategy.micro_batch, batch_reason),
            pick("vae_batch", strategy.vae_batch, default_vae_batch(facts, workload), "decoding takes the most memory"),
            pick("vae_tile", strategy.vae_tile, start.vae_tile, "an image of this size fits as a whole"),
            text_encoder(facts, workload, request, strategy, reason),
            pick("offload", strategy.offload, start.offload, "all networks fit on the device together"),
            offload_target(facts, request),
            *machine_decisions(facts, request),
        )
    )
    found = fast_paths(facts, workload, request, found)
    return found.extended(attention_decisions(facts, workload, request, found))


def text_encoder(facts: Facts, workload: Workload, request: Request, strategy: Strategy, reason: str) -> Decision:
    if strategy.text_encoder == "device":
        reason = "there is room for it"
    elif unloads_text_encoder(facts, workload, request):
        reason = (
            "it is removed from memory after the prompt is encoded, because reading it again for the next prompt takes"
            " little time beside the denoising on a CPU"
        )
    else:
        reason = f"it is removed from memory after the prompt is encoded, because {reason}"
    return resolve(request.user, "text_encoder", strategy.text_encoder, reason)


def attention_decisions(facts: Facts, workload: Workload, request: Request, found: Decisions) -> list[Decision]:
    """Attention for each component; scores may take a third of what the weights leave free."""
    weights = max(resident(workload, found, ("denoise", "decode")).values())
    room = max(LEAST_ROOM, (facts.budget - weights) // 3)
    decisions = []
    for component in ("unet", "vae", "text_encoder"):
        name, made = f"attention.{component}", attention_calls(component, workload, found)
        overflows = component == "unet" and bool(workload.unet.upcast_attention)
        if component == "unet" and made and request.attention_slicing is not None:
            asked = slicing_asked(facts, found.dtype(component), made, request.attention_slicing, overflows)
            decisions.append(Decision(name, *asked, by="user"))
        else:
            decisions.append(Decision(name, *choose_attention(facts, found.dtype(component), made, room, overflows)))
    return decisions


def within_caps(facts: Facts, workload: Workload, found: Decisions) -> bool:
    """Whether no tensor exceeds the device's limits; a CPU has none."""
    if facts.device == "cpu":
        return True
    caps = Caps.of(facts)
    return all(caps.allow(numbers, width) for numbers, width in largest_tensors(workload, found))


def largest_fit(facts: Facts, workload: Workload, request: Request) -> tuple[int, int] | None:
    """Width and height, multiples of 64, of the largest picture of about that shape that fits; None if none does."""
    longest = max(workload.width, workload.height)

    def of_side(side: int) -> tuple[int, int]:
        width, height = (max(1, round(edge * side / longest)) * 64 for edge in (workload.width, workload.height))
        return width, height

    def fits(side: int) -> bool:
        width, height = of_side(side)
        return best(facts, dataclasses.replace(workload, width=width, height=height), request) is not None

    # in units of 64 pixels; where a size fits, all smaller ones do
    most = bisect.bisect_left(range(1, longest // 64 + 1), True, key=lambda side: not fits(side))
    return of_side(most) if most else None
