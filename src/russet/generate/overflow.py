"""Pictures that stay finite: what to do when half precision has overflowed.

A number that is not finite stays so through every later step, so it is enough to look now and then, and to read a look
later: at once only where that costs no wait. The work then goes on from the last latents that were good, in more
precise arithmetic.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from russet.generate import engine
from russet.generate.conditioning import Conditioning
from russet.generate.guidance import Guidance
from russet.models.autoencoder import Autoencoder
from russet.planning.plan import Plan

log = logging.getLogger(__name__)

LOOK_EVERY = 5  # steps
UNREAD = {
    "immediate": 0,
    "deferred": 1,
    "at the end": sys.maxsize,
}  # checks that may be unread, by the plan's finite_checks


@dataclass(frozen=True)
class Good:
    """A place in a run to go on from: the step that begins there, its latents, and the state of the noise.

    conditioning, guidance: what the denoiser was told there, which a callback may have changed since.
    """

    step: int
    latents: Tensor
    noise: list[Tensor]
    conditioning: Conditioning
    guidance: Guidance


class Look:
    """A look for values that are not finite: one number that is not, if any was not. It is on its way to be read.

    place: where to go on from if all were; None for the end of a run.
    """

    def __init__(self, latents: Tensor, place: Good | None = None) -> None:
        self.place = place
        self.flag = latents.sum()
        self._arrived: torch.cuda.Event | None = None
        if self.flag.is_cuda:
            there = torch.empty((), dtype=self.flag.dtype, device="cpu", pin_memory=True)
            self.flag = there.copy_(self.flag, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def arrive(self) -> None:
        """On CUDA, waits until the device was there: the number is on the host then."""
        if self._arrived is not None:
            self._arrived.synchronize()


def read(looks: Sequence[Look]) -> list[bool]:
    """Whether all values were finite, for each look; one wait for all of them."""
    if not looks:
        return []
    for look in looks:
        look.arrive()
    return [math.isfinite(flag) for flag in torch.stack([look.flag for look in looks]).tolist()]


class Watch:
    """The last good place of a run, and the looks that are still to be read.

    Kept unread "at the end", every fifth step's latents stay in memory: of 50 steps of Stable Diffusion at 512×512
    that is 0.6 MiB a picture, a few thousandths of what one UNet call takes, and no plan counts it.

    reads: when looks are read, as the plan says. trusted: whether the network has drawn a whole picture in this
    arithmetic; if not, the first look is never left for the end: what always overflows is found after a few steps.
    """

    def __init__(self, good: Good, reads: str, trusted: bool) -> None:
        self.good = good
        self._unread = UNREAD[reads]
        self._wary = self._unread > 1 and not trusted
        self._looks: list[Look] = []

    def see(self, place: Good) -> bool:
        """Looks at a place; False once a look has found a value that is not finite."""
        self._looks.append(Look(place.latents, place))
        unread, self._wary = 0 if self._wary else self._unread, False
        return self._read(max(0, len(self._looks) - unread))

    def end(self, latents: Tensor) -> bool:
        """Looks at the end of the run, and reads everything; whether all was well."""
        self._looks.append(Look(latents))
        return self._read(len(self._looks))

    def _read(self, count: int) -> bool:
        """Reads the oldest looks, up to the first that is not well."""
        looks, self._looks = self._looks[:count], self._looks[count:]
        for look, finite in zip(looks, read(looks), strict=True):
            if not finite:
                return False
            self.good = look.place or self.good
        return True


@dataclass(frozen=True)
class Remedy:
    """More precise arithmetic for one network: its name in words, and how to switch it on."""

    name: str
    switch_on: Callable[[], object]

    def apply(self) -> str:
        """Switches it on; returns what the result is to say about it."""
        self.switch_on()
        note = f"a value was not finite (half precision overflowed): went on with the {self.name}"
        log.warning(note)
        return note


def is_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite; waits for the device. One that is makes their sum so."""
    return math.isfinite(float(x.sum()))


@contextlib.contextmanager
def remedies(pipe: Any, name: str, plan: Plan) -> Iterator[list[Remedy]]:
    """What can be tried for a network, the cheapest first; nothing where it computes in float32 already."""
    if pipe.known(name).dtype == torch.float32:
        yield []
        return
    with contextlib.ExitStack() as stack:
        yield [
            Remedy(
                f"{name}'s attention in float32", lambda: stack.enter_context(pipe.at_work(name, plan, "attention"))
            ),
            Remedy(f"whole {name} in float32", lambda: stack.enter_context(pipe.at_work(name, plan, "float32"))),
        ]


def decoded(pipe: Any, latents: Tensor, plan: Plan) -> tuple[Tensor, tuple[str, ...]]:
    """Latents → pixels [B, 3, H, W]; not finite or all black, they are made again more precisely."""
    notes: list[str] = []
    vae: Autoencoder = pipe.known("vae")
    with remedies(pipe, "vae", plan) as left:
        while True:
            pixels = engine.decode(vae, latents, plan.vae_batch)
            if is_picture(pixels):
                return pixels, tuple(notes)
            if not left:
                break
            notes.append(left.pop(0).apply())
    if not is_finite(pixels):
        notes.append("the picture is not finite even in float32: its latents or the VAE's weights must be damaged")
        pixels = torch.nan_to_num(pixels.cpu(), nan=-1.0)  # which mps has from torch 2.0 on
    return pixels, tuple(notes)


def is_picture(pixels: Tensor) -> bool:
    """Whether all values are finite and no picture is black from edge to edge."""
    return is_finite(pixels) and bool((pixels.flatten(1) > -1).any(dim=1).all())
