"""Overflow in half precision: finding values that are not finite, and going on in more precise arithmetic.

A value that is not finite stays so through every later step, so it is enough to check now and then, and to read the
result of a check later: at once only where that costs no wait. The work then goes on from the last snapshot that was
finite.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from russet.generate.conditioning import Conditioning
from russet.generate.guidance import Guidance
from russet.residency.form import Precision

log = logging.getLogger(__name__)

CHECK_EVERY = 5  # steps
UNREAD = {
    "immediate": 0,
    "deferred": 1,
    "at the end": sys.maxsize,
}  # checks that may be unread, by the plan's finite_checks


@dataclass(frozen=True)
class Snapshot:
    """A place in a run to go on from: the step that begins there, its latents, and the state of the generators.

    conditioning, guidance: what the denoiser had there, which a callback may have changed since.
    """

    step: int
    latents: Tensor
    noise: list[Tensor]
    conditioning: Conditioning
    guidance: Guidance


class FiniteCheck:
    """A check for values that are not finite: one number that is not, if any was not. It is on its way to the host.

    snapshot: where to go on from if all were; None for the end of a run.
    """

    def __init__(self, latents: Tensor, snapshot: Snapshot | None = None) -> None:
        self.snapshot = snapshot
        self.flag = latents.sum()
        self._arrived: torch.cuda.Event | None = None
        if self.flag.is_cuda:
            there = torch.empty((), dtype=self.flag.dtype, pin_memory=True)
            self.flag = there.copy_(self.flag, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def arrive(self) -> None:
        """On CUDA, waits until the number is on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()


def read(checks: Sequence[FiniteCheck]) -> list[bool]:
    """Whether all values were finite, for each check; one wait for all of them."""
    if not checks:
        return []
    for check in checks:
        check.arrive()
    return [math.isfinite(flag) for flag in torch.stack([check.flag for check in checks]).tolist()]


class FiniteMonitor:
    """The last finite snapshot of a run, and the checks that are still to be read.

    Read "at the end", every fifth step's latents stay in memory: of 50 steps of Stable Diffusion at 512×512 that is
    0.6 MiB a picture, a few thousandths of what one UNet call takes, and no plan counts it.

    reads: when checks are read, as the plan says. trusted: whether the network has made a whole picture in this
    precision; if not, the first check is never left for the end: what always overflows is found after a few steps.
    """

    def __init__(self, snapshot: Snapshot, reads: str, trusted: bool) -> None:
        self.finite = snapshot
        self._unread = UNREAD[reads]
        self._read_first = self._unread > 1 and not trusted
        self._checks: list[FiniteCheck] = []

    def check(self, snapshot: Snapshot) -> bool:
        """Checks a place; False once a check has found a value that is not finite."""
        self._checks.append(FiniteCheck(snapshot.latents, snapshot))
        unread, self._read_first = 0 if self._read_first else self._unread, False
        return self._read(max(0, len(self._checks) - unread))

    def end(self, latents: Tensor) -> bool:
        """Checks the end of the run, and reads everything; whether all was finite."""
        self._checks.append(FiniteCheck(latents))
        return self._read(len(self._checks))

    def _read(self, count: int) -> bool:
        """Reads the oldest checks, up to the first that fails."""
        checks, self._checks = self._checks[:count], self._checks[count:]
        for check, finite in zip(checks, read(checks), strict=True):
            if not finite:
                return False
            self.finite = check.snapshot or self.finite
        return True


@dataclass(frozen=True)
class Fallback:
    """More precise arithmetic for one network: its name, and the precision to have the network work in."""

    name: str
    precision: Precision

    def announce(self) -> str:
        """Logs that this is used; returns the note for the result."""
        note = f"a value was not finite (half precision overflowed): went on with the {self.name}"
        log.warning(note)
        return note


def fallbacks(component: str, network: nn.Module) -> list[Fallback]:
    """What can be tried for a network, the cheapest first; nothing where its weights are float32 already."""
    if network.dtype == torch.float32:
        return []
    return [
        Fallback(f"{component}'s attention in float32", "attention"),
        Fallback(f"whole {component} in float32", "float32"),
    ]


def is_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite; waits for the device. One that is makes their sum so."""
    return math.isfinite(float(x.sum()))


def is_picture(pixels: Tensor) -> bool:
    """Whether all values are finite and no picture is black from edge to edge."""
    return is_finite(pixels) and bool((pixels.flatten(1) > -1).any(dim=1).all())
