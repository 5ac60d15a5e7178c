"""Random numbers of the virtual device: streams of their own, so that noise drawn on the device is never the CPU's.

On a Mac the same seed gives other numbers on mps than on the CPU. Here they come from a CPU generator whose seed is
altered: a program that draws on the wrong device gets a visibly different picture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .machine import VirtualMac

ALTERED = 0x6D7073  # "mps"
MPS = torch.device("mps:0")
CpuGenerator = torch.Generator
OF_THE_DEVICE: set[int] = (
    set()
)  # operators are handed another object for the same stream; its address tells which it is


class GeneratorType(type(CpuGenerator)):  # type: ignore[misc]
    """Makes ``torch.Generator(device=…)`` give either kind, and ``isinstance`` know both."""

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        if torch.device(device).type != "mps":
            return CpuGenerator(device)
        made: VirtualGenerator = type.__call__(cls)
        OF_THE_DEVICE.add(made._cdata)
        return made

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, CpuGenerator)


class VirtualGenerator(CpuGenerator, metaclass=GeneratorType):
    """``torch.Generator(device="mps")`` on a virtual Mac."""

    def __del__(self) -> None:
        OF_THE_DEVICE.discard(self._cdata)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return MPS

    def manual_seed(self, seed: int) -> VirtualGenerator:
        super().manual_seed(seed ^ ALTERED)
        return self

    def initial_seed(self) -> int:
        return super().initial_seed() ^ ALTERED

    def seed(self) -> int:
        return super().seed() ^ ALTERED


def check_generator(generator: torch.Generator | None, device: str) -> None:
    """Raises RuntimeError, in torch's words, for a generator of another device than the tensor's."""
    if generator is None:
        return
    found = "mps" if generator._cdata in OF_THE_DEVICE else generator.device.type  # type: ignore[attr-defined]
    if found != device:
        raise RuntimeError(f"Expected a '{device}' device type for generator but found '{found}'")


@contextlib.contextmanager
def device_stream(mac: VirtualMac, generator: torch.Generator | None) -> Iterator[None]:
    """While it is open, an operator on the device draws from the generator that it was given, else the device's stream.

    Operators that take no generator draw from the CPU's default one, so it lends its place to the device's.
    """
    check_generator(generator, "mps")
    if generator is not None:
        yield
        return
    kept = torch.default_generator.get_state()
    torch.default_generator.set_state(mac.generator.get_state())
    try:
        yield
    finally:
        mac.generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(kept)
