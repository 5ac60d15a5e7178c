"""Kernels written in Triton, compiled before a picture needs them: while weights are moved and read."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from russet import doubling_triton as doubling
from russet import group_norm_triton, tokens_triton
from russet import products_triton as products
from russet.group_norm_triton import channel_sums, group_norm, lines, normalised
from russet.tokens_triton import gated, layer_norm

KERNELS = group_norm_triton, tokens_triton, products, doubling
"""Files of kernels."""

log = logging.getLogger(__name__)


class KernelsAhead:
    """Compiles the kernels beside whatever the program does, and knows whether that failed."""

    def __init__(self, gated_products: bool, transposed: bool) -> None:
        self._wanted = gated_products, transposed
        self._jobs: dict[tuple[torch.device, torch.dtype], threading.Thread] = {}
        self._failed = False

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Begins to compile the kernels for a dtype; what compiles them may fail."""
        if (device, dtype) not in self._jobs:
            self._jobs[device, dtype] = job = threading.Thread(target=self._compile, args=(device, dtype), daemon=True)
            job.start()

    def failed(self) -> bool:
        """Whether there are no kernels. Waits for those that are being compiled."""
        for job in tuple(self._jobs.values()):
            job.join()
        return self._failed

    def _compile(self, device: torch.device, dtype: torch.dtype) -> None:
        try:
            first, *others = runs(device, dtype, *self._wanted)
            run_on(device, first)  # alone, since Triton itself starts with it
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "compile") as pool:
                list(pool.map(functools.partial(run_on, device), others))
        except Exception as error:  # no compiler, no room for its files: many things that are not ours
            self._failed = True
            log.warning("Triton cannot compile kernels here, so PyTorch's own are used: %s", error)


def run_on(device: torch.device, call: Callable[[], object]) -> None:
    """Makes a call on a stream of its own, and waits for its end."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(stream):  # type: ignore[no-untyped-call]
        call()
    stream.synchronize()


def runs(
    device: torch.device, dtype: torch.dtype, gated_products: bool, transposed: bool
) -> list[Callable[[], object]]:
    """One call for each kernel and each set of its constants, for the sizes of Stable Diffusion's layers."""

    def blank(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    def norm(channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(32, channels, device=device, dtype=dtype)

    def layer(features: int) -> Callable[[], object]:
        x, layer = blank(1, 64, features), nn.LayerNorm(features, device=device, dtype=dtype)
        return lambda: layer_norm(x, layer, None)

    def linear(inputs: int, outputs: int) -> nn.Linear:
        made = nn.Linear(inputs, outputs, device="meta", dtype=dtype)  # a real one would draw random numbers
        made.weight, made.bias = nn.Parameter(blank(outputs, inputs)), nn.Parameter(blank(outputs))
        return made

    def channels_last(channels: int, side: int) -> Tensor:
        return blank(1, channels, side, side).contiguous(memory_format=torch.channels_last)

    x, small, tokens = channels_last(320, 64), channels_last(1280, 8), blank(1, 64, 2560)
    wide = channels_last(2560, 8)
    weight = blank(64, 64, 3, 3).contiguous(memory_format=torch.channels_last)
    gate = blank(1, 64, 320), linear(320, 2560)
    return [
        lambda: gated(tokens),
        lambda: normalised(small, torch.empty_like(small), norm(1280), True, None),
        lambda: group_norm(x, norm(320), True, None),
        lambda: lines(wide, channel_sums(wide), norm(2560), None),
        *map(layer, (320, 640, 1280)),
        *([lambda: products.gated_product(*gate)] if gated_products else []),
        *([lambda: doubling.gathered(weight)] if transposed else []),
    ]
