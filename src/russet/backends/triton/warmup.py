"""Kernels written in Triton, compiled before a picture needs them: while weights are moved and read.

Compiling is a second of work that threads share as far as Python's lock lets them, once Triton has started, which takes
another one. Processes of their own were no quicker on sixteen cores, since each has to start Triton (first pictures
after loading with an empty cache 4.0 and 5.0 s so, 3.7 and 4.2 s by threads; H100, Triton 3.6). What helped is that no
kernel is compiled before the others: 2.4 instead of 3.7 and 3.9 s (H200; one run, with Triton started by them all).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional as F

from russet.backends.norm_heuristics import PLACES
from russet.backends.triton import geglu, group_norm, tokens, upsample
from russet.backends.triton.group_norm import ChannelSums, applied, channel_lines, channel_sums, normalised
from russet.backends.triton.tokens import gated, layer_norm

KERNELS = group_norm, tokens, geglu, upsample
"""Files of kernels."""

log = logging.getLogger(__name__)

_STARTING = threading.Lock()


class Warmup:
    """Compiles the kernels beside whatever the program does, once a process, and knows whether that failed."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[torch.device, torch.dtype, bool, bool], tuple[threading.Thread, ...]] = {}
        self._failed = False

    def prepare(self, device: torch.device, dtype: torch.dtype, *, fused_geglu: bool, upsample_fusion: bool) -> None:
        """Begins to compile the kernels for a dtype, and to start cuDNN; does nothing the second time."""
        key = (device, dtype, fused_geglu, upsample_fusion)
        if key not in self._jobs:
            compiling = threading.Thread(target=self._compile, args=key, daemon=True)
            starting = threading.Thread(target=start_cudnn, args=(device, dtype), daemon=True)
            self._jobs[key] = compiling, starting
            for job in self._jobs[key]:
                job.start()

    def ready(self) -> bool:
        """Whether there are kernels. Waits for those that are being compiled, and for cuDNN's start.

        While a call is captured as a CUDA graph, no other thread may take memory on the GPU.
        """
        for jobs in tuple(self._jobs.values()):
            for job in jobs:
                job.join()
        return not self._failed

    def _compile(self, device: torch.device, dtype: torch.dtype, fused_geglu: bool, upsample_fusion: bool) -> None:
        try:
            start_triton()
            wanted = runs(device, dtype, fused_geglu, upsample_fusion)
            with ThreadPoolExecutor(len(wanted), "compile") as pool:  # none waits for another one's assembler
                list(pool.map(functools.partial(run_on, device), wanted))
        except Exception as error:  # no compiler, no room for its files: many things that are not ours
            self._failed = True
            log.warning("Triton cannot compile kernels here, so PyTorch's own are used: %s", error)


_WARMUP = Warmup()
prepare, ready = _WARMUP.prepare, _WARMUP.ready


def run_on(device: torch.device, call: Callable[[], object]) -> None:
    """Makes a call on a stream of its own, and waits for its end."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(stream):  # type: ignore[no-untyped-call]
        call()
    stream.synchronize()


def start_triton() -> None:
    """Has Triton compile what it talks to the driver by, and meanwhile hash its own files, which name what it caches.

    The first kernel would do one after the other. Several at once would each do all of it.
    """
    with _STARTING:
        hashing = threading.Thread(target=hash_triton, daemon=True)
        hashing.start()
        triton.runtime.driver.active.get_current_device()
        hashing.join()


def hash_triton() -> None:
    """Triton keeps the hash. Where it is not found under its names, the first kernels make it for themselves."""
    for place in ("triton.runtime.cache", "triton.compiler.compiler"):
        with contextlib.suppress(ImportError, AttributeError):
            importlib.import_module(place).triton_key()
            return


def start_cudnn(device: torch.device, dtype: torch.dtype) -> None:
    """Has cuDNN read its libraries, which its first convolution and its first attention would wait for."""

    def call() -> None:
        x = torch.zeros(1, 64, 16, 16, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        F.conv2d(x, torch.zeros(64, 64, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last))
        heads = torch.zeros(1, 8, 64, 40, device=device, dtype=dtype)
        F.scaled_dot_product_attention(heads, heads, heads)

    try:
        run_on(device, call)
    except Exception as error:  # whoever needs it will hear of it
        log.debug("cuDNN could not be started ahead: %s", error)


def runs(
    device: torch.device, dtype: torch.dtype, fused_geglu: bool, upsample_fusion: bool
) -> list[Callable[[], object]]:
    """One call for each kernel and each set of its constants, for the sizes of Stable Diffusion's layers."""

    def blank(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    def channels_last(channels: int, side: int) -> Tensor:
        return blank(1, channels, side, side).contiguous(memory_format=torch.channels_last)

    def norm(channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(32, channels, device=device, dtype=dtype)

    def layer(features: int) -> Callable[[], object]:
        x, layer = blank(1, 64, features), nn.LayerNorm(features, device=device, dtype=dtype)
        return lambda: layer_norm(x, layer, None)

    def gate(features: int) -> Callable[[], object]:
        if not fused_geglu:
            return lambda: gated(blank(1, 64, 8 * features))
        proj = nn.Linear(features, 8 * features, device="meta", dtype=dtype)  # a real one would draw random numbers
        proj.weight, proj.bias = nn.Parameter(blank(8 * features, features)), nn.Parameter(blank(8 * features))
        return lambda: geglu.gated_product(blank(1, 64, features), proj)

    x, small = channels_last(320, 64), channels_last(1280, 8)
    sums = ChannelSums(torch.zeros(1, x[0, 0].numel() // PLACES, 2, 320, device=device), PLACES)
    line = torch.zeros(1, 2, 320, device=device)
    weight = blank(64, 64, 3, 3).contiguous(memory_format=torch.channels_last)
    return [
        lambda: normalised(small, torch.empty_like(small), norm(1280), True, None),
        lambda: channel_sums(x),
        lambda: channel_lines(x, sums, norm(320), None),
        lambda: applied(x, torch.empty_like(x), line, True),
        *map(layer, (320, 640, 1280)),
        gate(320),
        *([lambda: upsample.gathered_weights(weight)] if upsample_fusion else []),
    ]
