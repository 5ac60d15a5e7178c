"""Who takes part: each contestant is one line of data, and a function that loads it in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Pipeline = Any
Load = Callable[[Path, str, str, Mapping[str, Any]], Pipeline]


@dataclass(frozen=True)
class Contestant:
    """``load`` is given the model's folder, the device, the precision ("" leaves it to the library) and ``options``.

    ``compiles``: its first call makes kernels that a cache keeps, so its cold start is timed with and without them.
    """

    label: str
    load: Load
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: Mapping[str, str] = field(default_factory=lambda: {"cuda": "float16", "cpu": "float32"})
    compiles: bool = False

    def loaded(self, folder: Path, device: str) -> Pipeline:
        return self.load(folder, device, self.dtype.get(device, ""), self.options)


# -- Diffusers


def diffusers(folder: Path, device: str, dtype: str, options: Mapping[str, Any]) -> Pipeline:
    """``channels_last``, ``fuse`` and ``compile`` (a mode of torch.compile) are what its guide to speed lists."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    if options.get("channels_last"):
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if options.get("fuse"):
        pipe.fuse_qkv_projections()
    if mode := options.get("compile"):
        pipe.unet = torch.compile(pipe.unet, mode=mode, fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode, fullgraph=True)
    return pipe


# -- Russet


def russet(folder: Path, device: str, dtype: str, options: Mapping[str, Any]) -> Pipeline:
    """``switches`` are methods to call before the first picture; without any the plan decides alone."""
    from russet import DiffusionPipeline

    if options.get("exact"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipe = DiffusionPipeline.from_pretrained(folder, **({"dtype": dtype} if dtype else {}))
    pipe.set_progress_bar_config(disable=True)
    for switch in options.get("switches", ()):
        getattr(pipe, switch)()
    return pipe.to(device)


PLAIN = {"switches": ("disable_fast_paths",)}
UNTOLD: dict[str, str] = {}  # no precision is asked for
FLOAT32 = {"cuda": "float32", "cpu": "float32"}
BFLOAT16 = {"cuda": "bfloat16", "cpu": "bfloat16"}
COMPILED = {"channels_last": True, "fuse": True, "compile": "reduce-overhead"}

CONTESTANTS: dict[str, Contestant] = {
    "diffusers": Contestant("Diffusers, as it ships", diffusers),
    "diffusers-last": Contestant("Diffusers, channels-last", diffusers, {"channels_last": True}),
    "diffusers-bf16": Contestant("Diffusers, channels-last, bfloat16", diffusers, {"channels_last": True}, BFLOAT16),
    "diffusers-best": Contestant("Diffusers, compiled", diffusers, COMPILED, compiles=True),
    "russet": Contestant("Russet, as it ships", russet, dtype=UNTOLD, compiles=True),
    "russet-plain": Contestant("Russet, plain path", russet, PLAIN),
    "russet-deep": Contestant("Russet, deep cache (opt-in)", russet, {"switches": ("enable_deep_cache",)}),
    "russet-bf16": Contestant("Russet, bfloat16 (opt-in)", russet, dtype=BFLOAT16),
    "reference": Contestant("Russet, plain path, float32", russet, {**PLAIN, "exact": True}, FLOAT32),
}
"""By the name that the command line knows. ``reference`` is no contestant: the pictures of others are held to its."""


def caches(folder: Path) -> dict[str, str]:
    """Environment variables that put everything a compiling contestant keeps into one folder."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "XDG_CACHE_HOME": str(folder / "xdg"),
    }


def without_network() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
