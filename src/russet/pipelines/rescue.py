"""Pictures that stay finite: what to do when half precision has overflowed.

A number that is not finite stays so through every later step, so it is enough to look now and then: each look waits
for the device, or on CUDA for where the device was some steps ago. The work then goes on from the last latents that
were good, in more precise arithmetic.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from russet.devices.plan import Plan
from russet.models.autoencoder import Autoencoder
from russet.models.base import Model
from russet.pipelines import engine, placement

log = logging.getLogger(__name__)

LOOK_EVERY = 5  # steps


@dataclass(frozen=True)
class Good:
    """A place in a run to go on from: the step that begins there, its latents, and the state of the noise."""

    step: int
    latents: Tensor
    noise: list[Tensor]


class Look:
    """A look for values that are not finite. On CUDA it is read ``later``, and the work goes on meanwhile."""

    def __init__(self, place: Good) -> None:
        self.place = place
        self._flag = place.latents.sum()
        self.later = self._flag.is_cuda
        if self.later:
            there = torch.empty((), dtype=self._flag.dtype, pin_memory=True)
            self._flag = there.copy_(self._flag, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def finite(self) -> bool:
        """Whether all values were; waits until the device is that far."""
        if self.later:
            self._done.synchronize()
        return math.isfinite(float(self._flag))


class Watch:
    """The last good place of a run, and the look that is under way."""

    def __init__(self, good: Good) -> None:
        self.good = good
        self._look: Look | None = None

    def see(self, place: Good) -> bool:
        """Looks at a place; False once a look has found a value that is not finite."""
        if not self.settled():
            return False
        self._look = Look(place)
        return self._look.later or self.settled()

    def settled(self) -> bool:
        """Reads the look that is under way; whether all was well."""
        if self._look is not None:
            if not self._look.finite():
                return False
            self.good, self._look = self._look.place, None
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


def remedies(name: str, network: Model, plan: Plan) -> list[Remedy]:
    """What can be tried for a network, the cheapest first; nothing where it computes in float32 already."""
    if network.dtype == torch.float32:
        return []
    precise = placement.attention_of(plan, name, upcast=True)
    return [
        Remedy(f"{name}'s attention in float32", lambda: network.set_attention(precise)),
        Remedy(f"whole {name} in float32", lambda: network.to(torch.float32)),
    ]


@contextlib.contextmanager
def restored(name: str, network: Model, plan: Plan) -> Iterator[None]:
    """Undoes afterwards what remedies did: half-precision weights go to float32 and back without a loss."""
    dtype = network.dtype
    try:
        yield
    finally:
        if network.dtype != dtype:
            network.to(dtype)
            network.set_attention(placement.attention_of(plan, name))


def decoded(vae: Autoencoder, latents: Tensor, plan: Plan) -> tuple[Tensor, tuple[str, ...]]:
    """Latents → pixels [B, 3, H, W]; not finite or all black, they are made again more precisely."""
    notes: list[str] = []
    left = remedies("vae", vae, plan)
    with restored("vae", vae, plan):
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
