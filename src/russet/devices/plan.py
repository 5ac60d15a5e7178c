"""The plan: what to do on this machine, decided in one place by a pure function, each decision with its reason.

    facts = read_facts("mps")                       # or mac("M1", memory_gib=8)
    sizes = Sizes.of(unet=…, vae=…, text_encoder=…, width=512, height=512, images=4)
    print(plan(facts, sizes, Request()).explain())

What a pipeline does with each decision is written in ``russet.devices.choices.MEANING``, one line per name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from russet.devices import activations
from russet.devices.attention_rules import Caps, asked_attention, choose_attention
from russet.devices.choices import MEANING, AttentionChoice, Decision, Request, Tile, gigabytes
from russet.devices.facts import Facts
from russet.devices.memory import Estimate, Sizes, predict, resident, unet_calls, vae_call
from russet.devices.rules import dtype_decisions, machine_decisions
from russet.devices.setup import Setup
from russet.errors import DoesNotFit

__all__ = ["MEANING", "AttentionChoice", "Decision", "Plan", "Request", "Tile", "plan"]

TILE = Tile(size=64, overlap=16)
SHARE = {"mps": 0.5, "cuda": 1.0, "cpu": 0.25}  # of the budget that a larger micro-batch may fill


@dataclass(frozen=True)
class Plan:
    """All decisions, and the memory they are predicted to take. ``plan["micro_batch"]`` is a decision's value.

    ``peak`` is the predicted peak in bytes, ``budget`` what is free for it now, ``limit`` what it must not pass.
    """

    decisions: tuple[Decision, ...]
    estimate: Estimate
    budget: int
    limit: int
    device: str

    def __getitem__(self, name: str) -> Any:
        return self.why(name).value

    def why(self, name: str) -> Decision:
        """A decision with its reason; KeyError for a name that is not in ``MEANING``."""
        return {decision.name: decision for decision in self.decisions}[name]

    @property
    def peak(self) -> int:
        return self.estimate.peak

    @property
    def micro_batch(self) -> int:
        return cast(int, self["micro_batch"])

    @property
    def vae_batch(self) -> int:
        return cast(int, self["vae_batch"])

    @property
    def vae_tile(self) -> Tile | None:
        return cast("Tile | None", self["vae_tile"])

    @property
    def offload(self) -> str | None:
        return cast("str | None", self["offload"])

    @property
    def text_encoder(self) -> str:
        return cast(str, self["text_encoder"])

    @property
    def memory_format(self) -> str:
        return cast(str, self["memory_format"])

    @property
    def priming(self) -> bool:
        return cast(bool, self["priming"])

    def dtype(self, component: str) -> str:
        """The torch dtype's name for ``"text_encoder"``, ``"unet"``, ``"vae"`` or ``"safety_checker"``."""
        return cast(str, self[f"dtype.{component}"])

    def attention(self, component: str) -> AttentionChoice:
        """The attention for ``"text_encoder"``, ``"unet"`` or ``"vae"``."""
        return cast(AttentionChoice, self[f"attention.{component}"])

    @property
    def environment(self) -> Mapping[str, str]:
        """Environment variables to set before the device is first used, unless the user has set any of them."""
        if self["watermark"] is None:
            return {}
        high, low = self["watermark"]
        return {"PYTORCH_MPS_HIGH_WATERMARK_RATIO": str(high), "PYTORCH_MPS_LOW_WATERMARK_RATIO": str(low)}

    def explain(self) -> str:
        """The plan in readable lines."""
        lines = [f"on {self.device}: at most {gigabytes(self.peak)} of {gigabytes(self.budget)} that are free"]
        if self.peak > self.budget:
            lines.append(f"  more than is free now (the limit is {gigabytes(self.limit)}): close other programs")
        lines += [f"  {phase.name}: {gigabytes(phase.peak)}" for phase in self.estimate.phases]
        return "\n".join(lines + [f"  {decision}" for decision in self.decisions])


def plan(facts: Facts, sizes: Sizes, request: Request | None = None) -> Plan:
    """Decides how to do the work on a machine. Pure: the same arguments give the same plan.

    Raises:
        DoesNotFit: no way of doing it stays within the machine's limits; says which size would.
        InputError: an attention slice size larger than the number of heads.
    """
    asked = request or Request()
    dtypes = dtype_decisions(facts, sizes, asked)
    chosen = best(facts, sizes, asked)
    if chosen is None:
        raise DoesNotFit(refusal(facts, sizes, asked))
    setup, estimate = chosen
    decisions = (*dtypes, *memory_decisions(facts, sizes, asked, setup), *machine_decisions(facts, asked))
    return Plan(decisions, estimate, facts.budget, facts.limit, f"{facts.chip} ({facts.device})")


def best(facts: Facts, sizes: Sizes, request: Request) -> tuple[Setup, Estimate] | None:
    """The fastest setup that stays within what is free now; else the most frugal one, if the limits allow it."""
    frugal = None
    for setup in setups(facts, sizes, request):
        estimate = predict(sizes, setup)
        if not allowed(facts, sizes, setup):
            continue
        share = SHARE[facts.device] if setup.micro_batch > 1 and "micro_batch" not in request.user else 1.0
        if estimate.peak <= facts.budget * share:
            return setup, estimate
        if frugal is None or estimate.peak < frugal[1].peak:
            frugal = setup, estimate
    return frugal if frugal and frugal[1].peak <= facts.limit else None


def setups(facts: Facts, sizes: Sizes, request: Request) -> Iterator[Setup]:
    """Ways of doing the work, from the fastest to the most frugal, the user's choices held fast in all of them."""
    user = request.user
    drops = request.rereadable or not facts.unified
    aside = "cpu" if facts.device == "cuda" else "freed"
    texts = ["device", aside] if drops else ["device"]
    offloads = [None, "model"] if drops else [None]
    offloads += ["sequential"] if facts.device == "cuda" else []
    tiles = [TILE] if request.vae_tiling else [None, TILE]
    rungs: list[tuple[int, Tile | None, str, str | None]] = [
        (n, tiles[0], texts[0], None) for n in divisors(sizes.images)
    ]
    rungs += [(1, tiles[-1], text, None) for text in texts]
    rungs += [(1, tiles[-1], "device", offload) for offload in offloads[1:]]
    seen = set()
    for micro_batch, tile, text, offload in rungs:
        rung = (
            user.get("micro_batch", micro_batch),
            user.get("vae_tile", tile),
            user.get("text_encoder", text),
            user.get("offload", offload),
        )
        if rung not in seen:
            seen.add(rung)
            yield with_attention(facts, sizes, request, bare_setup(facts, sizes, request, rung, drops))


def bare_setup(facts: Facts, sizes: Sizes, request: Request, rung: tuple[Any, ...], drops: bool) -> Setup:
    """A rung of the ladder as a setup, its attention still to be chosen."""
    micro_batch, tile, text, offload = rung
    roomy = max(1, 1024 * 1024 // (sizes.width * sizes.height)) if facts.device == "cuda" else 1
    vae_batch = sizes.images if request.vae_slicing is False else request.user.get("vae_batch", roomy)
    return Setup(
        dtypes={d.name.partition(".")[2]: d.value for d in dtype_decisions(facts, sizes, request)},
        micro_batch=min(micro_batch, sizes.images),
        vae_batch=min(vae_batch, sizes.images),
        vae_tile=tile,
        text_encoder=text,
        offload=offload,
        drops=drops,
    )


def with_attention(facts: Facts, sizes: Sizes, request: Request, setup: Setup) -> Setup:
    """The setup with its attention, which may take a quarter of what the parameters leave free."""
    room = max(2**26, (facts.budget - max(resident(sizes, setup, ("denoise", "decode")).values())) // 4)
    return dataclasses.replace(
        setup,
        unet_attention=unet_attention(facts, sizes, request, setup, room)[0],
        vae_attention=choose_attention(facts, setup.dtypes["vae"], [vae_call(sizes, setup)], room)[0],
        text_attention=choose_attention(facts, setup.dtypes["text_encoder"], text_calls(sizes), room)[0],
    )


def unet_attention(
    facts: Facts, sizes: Sizes, request: Request, setup: Setup, room: int
) -> tuple[AttentionChoice, str]:
    calls = unet_calls(sizes, setup)
    if request.attention_slicing is not None:
        return asked_attention(facts, setup.dtypes["unet"], calls, request.attention_slicing)
    return choose_attention(facts, setup.dtypes["unet"], calls, room)


def text_calls(sizes: Sizes) -> list[activations.Attended]:
    return [
        activations.Attended(
            batch=sizes.rows * sizes.images, heads=t.heads, queries=t.tokens, keys=t.tokens, dim=t.width // t.heads
        )
        for t in sizes.text
    ] or [activations.Attended(batch=1, heads=1, queries=1, keys=1, dim=64)]


def allowed(facts: Facts, sizes: Sizes, setup: Setup) -> bool:
    """Whether no score tensor passes the device's limits."""
    caps = Caps.of(facts)
    pairs = [(setup.vae_attention, vae_call(sizes, setup))]
    pairs += [(setup.unet_attention, call) for call in unet_calls(sizes, setup)]
    return all(caps.allow(call.scores(choice), 4) for choice, call in pairs)


def divisors(number: int) -> list[int]:
    """All divisors, the largest first: parts of one size keep one shape."""
    return [n for n in range(number, 0, -1) if number % n == 0]


def memory_decisions(facts: Facts, sizes: Sizes, request: Request, setup: Setup) -> list[Decision]:
    """The setup that was chosen, as decisions."""
    room = max(2**26, (facts.budget - max(resident(sizes, setup, ("denoise", "decode")).values())) // 4)
    user = request.user
    by_slicing = "user" if request.attention_slicing is not None else "plan"
    unet, why_unet = unet_attention(facts, sizes, request, setup, room)
    vae, why_vae = choose_attention(facts, setup.dtypes["vae"], [vae_call(sizes, setup)], room)
    text, why_text = choose_attention(facts, setup.dtypes["text_encoder"], text_calls(sizes), room)
    tile_by = "plan" if request.vae_tiling is None else "user"
    batch_by = "plan" if request.vae_slicing is None else "user"
    why_tile = "the whole picture at once fits" if setup.vae_tile is None else "the whole picture at once is too large"
    why_micro = "as many as fit" if setup.micro_batch > 1 else "one at a time takes the least memory"
    why_text_place = "it fits" if setup.text_encoder == "device" else "its memory is needed"
    why_offload = "everything fits" if setup.offload is None else "not everything fits at once"
    return [
        Decision("attention.unet", unet, why_unet, by=by_slicing),  # type: ignore[arg-type]
        Decision("attention.vae", vae, why_vae),
        Decision("attention.text_encoder", text, why_text),
        Decision("micro_batch", setup.micro_batch, why_micro, by="user" if "micro_batch" in user else "plan"),
        Decision("vae_batch", setup.vae_batch, "the VAE is the widest moment", by=batch_by),  # type: ignore[arg-type]
        Decision("vae_tile", setup.vae_tile, why_tile, by=tile_by),  # type: ignore[arg-type]
        Decision("text_encoder", setup.text_encoder, why_text_place, by="user" if "text_encoder" in user else "plan"),
        Decision("offload", setup.offload, why_offload, by="user" if "offload" in user else "plan"),
    ]


def refusal(facts: Facts, sizes: Sizes, request: Request) -> str:
    """What is missing, and the largest picture of the same shape that would fit."""
    least = min((predict(sizes, setup).peak for setup in setups(facts, sizes, request)), default=0)
    fits = largest_fit(facts, sizes, request)
    advice = (
        f"the largest picture of this shape that fits is {fits[0]}×{fits[1]}"
        if fits
        else "no size fits: the networks alone are too large for this device"
    )
    return (
        f"{sizes.images} picture(s) of {sizes.width}×{sizes.height} need {gigabytes(least)} at the least;"
        f" {facts.chip} allows {gigabytes(facts.limit)}; {advice}"
    )


def largest_fit(facts: Facts, sizes: Sizes, request: Request) -> tuple[int, int] | None:
    """Width and height, multiples of 64, of the largest picture of the same shape that fits; None if none does."""
    steps = max(sizes.width, sizes.height) // 64
    for step in range(steps, 0, -1):
        scale = step * 64 / max(sizes.width, sizes.height)
        width, height = (max(64, int(side * scale) // 64 * 64) for side in (sizes.width, sizes.height))
        if best(facts, dataclasses.replace(sizes, width=width, height=height), request):
            return width, height
    return None
