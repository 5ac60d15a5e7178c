"""Kernels, waits and bytes on a virtual Mac, Russet beside Diffusers, as a Markdown table.

    python benchmarks/mps_counts.py [--full] [--chip M1] [--memory 16] [--macos 15.0] [--torch 2.13.0]
                                    [--dtype float16] [--sliced] [--detail]

No Mac is needed, and nothing is computed: the virtual device of tests/devices/virtual_mps runs both pipelines on shapes
alone and counts what a real one would do. Counted are operators that run on the device, without views; one that the
virtual torch takes apart counts as its parts. A wait is whatever makes the host wait for the device: a number read, a
copy from it, a copy to it. Bytes are those of live tensors, each storage once, and of attention's score matrix where
that torch builds one; what MPSGraph holds inside a kernel is not known.

"a UNet call" is the last one of a run, as guidance makes it, and "over weights" is all that is live at its widest
moment but for the weights, so also what was made for the run. "a step" is the difference between runs of 8 and 4 steps,
divided by 4: guidance and the scheduler are in it, text and decoding are not. A first run, in which weights find their
places, is not counted. The default geometry is tiny; ``--full`` is Stable Diffusion 1.5 at 512×512.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers
from torch import nn

import russet
from harness.geometry import SD15, TINY, Geometry
from russet.models.clip_text import CLIPTextModel
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL
from russet.text.tokenizer import CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "devices"))
from virtual_mps import Counts, VirtualMac

# Found now: some of them look for what an older torch does not have while they are imported.
THEIRS = {
    name: getattr(owner, name)
    for owner, names in {
        diffusers: ("AutoencoderKL", "PNDMScheduler", "StableDiffusionPipeline", "UNet2DConditionModel"),
        transformers: ("CLIPTextConfig", "CLIPTextModel", "CLIPTokenizer"),
    }.items()
    for name in names
}
TOKENIZER = Path(russet.__file__).parent / "mini" / "tokenizer"
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
STEPS = (4, 8)
HEADER = """\
| | kernels a UNet call | views | MiB over weights | kernels a step | waits a step | uploads a step | MiB, whole run |
|---|---|---|---|---|---|---|---|"""


def hollow(network: nn.Module) -> nn.Module:
    """The network with weights of the right shape that take no memory: one number each, seen many times."""
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            number = torch.zeros((), dtype=weight.dtype)
            setattr(module, name, nn.Parameter(number.expand(weight.shape), requires_grad=False))
    return network.eval()


def diffusers_pipeline(geometry: Geometry) -> Any:
    with torch.device("meta"):
        unet = THEIRS["UNet2DConditionModel"](**geometry.unet)
        vae = THEIRS["AutoencoderKL"](**geometry.vae)
    text = THEIRS["CLIPTextModel"](THEIRS["CLIPTextConfig"](**geometry.text))  # its buffers want numbers
    return THEIRS["StableDiffusionPipeline"](
        unet=hollow(unet),
        vae=hollow(vae),
        text_encoder=hollow(text),
        tokenizer=THEIRS["CLIPTokenizer"].from_pretrained(TOKENIZER),
        scheduler=THEIRS["PNDMScheduler"](**SCHEDULER, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def russet_pipeline(geometry: Geometry) -> Any:
    return russet.StableDiffusionPipeline(
        unet=hollow(UNet2DConditionModel(geometry.unet)),
        vae=hollow(AutoencoderKL(geometry.vae)),
        text_encoder=hollow(CLIPTextModel(geometry.text)),
        tokenizer=CLIPTokenizer.from_files(TOKENIZER),
        scheduler=russet.PNDMScheduler(**SCHEDULER, skip_prk_steps=True),
        safety_checker=None,
        requires_safety_checker=False,
    )


@dataclass(frozen=True)
class Result:
    """What one contestant needed: for a UNet call, for each number of steps; and the bytes of its weights."""

    unet: Counts
    runs: dict[int, Counts]
    weights: int

    def a_step(self, count: Callable[[Counts], int]) -> float:
        few, many = (count(self.runs[steps]) for steps in STEPS)
        return (many - few) / (STEPS[1] - STEPS[0])


def measure(pipe: Any, mac: VirtualMac, side: int) -> Result:
    """Runs a pipeline that is on the Mac."""
    pipe.set_progress_bar_config(disable=True)

    def draw(steps: int) -> None:
        seed = torch.Generator().manual_seed(0)
        pipe("a cat", height=side, width=side, num_inference_steps=steps, generator=seed)

    draw(1)
    weights, calls, runs = mac.account.live, [Counts()], {}

    def counted(self: nn.Module, *args: Any, **options: Any) -> Any:
        with mac.measure() as calls[0]:
            return nn.Module.__call__(self, *args, **options)

    # The class's, since a network with a forward of its own is the user's, and Russet leaves it as it is.
    with mock.patch.object(type(pipe.unet), "__call__", counted):
        for steps in STEPS:
            with mac.measure() as runs[steps]:
                draw(steps)
    return Result(calls[0], runs, weights)


def row(name: str, result: Result) -> str:
    views = sum(result.unet.views.values())
    peak = max(run.extra for run in result.runs.values())
    return (
        f"| {name} | {result.unet.kernel_count} | {views} | {(result.unet.peak - result.weights) / 2**20:.0f} "
        f"| {result.a_step(lambda run: run.kernel_count):.1f} | {result.a_step(lambda run: run.sync_count):.2f} "
        f"| {result.a_step(lambda run: run.syncs['upload']):.2f} | {peak / 2**20:.0f} |"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="Stable Diffusion 1.5 at 512×512")
    parser.add_argument("--chip", default="M1")
    parser.add_argument("--memory", type=float, default=16, help="GiB")
    parser.add_argument("--macos", default="15.0")
    parser.add_argument("--torch", default="2.13.0")
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"))
    parser.add_argument("--sliced", action="store_true", help="enable_attention_slicing() on both")
    parser.add_argument("--detail", action="store_true", help="the kernels of the UNet call by name")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    geometry, dtype = SD15 if options.full else TINY, getattr(torch, options.dtype)
    print(
        f"Apple {options.chip}, {options.memory:g} GiB, macOS {options.macos}, torch {options.torch}, {options.dtype}; "
        f"Diffusers {diffusers.__version__}; one guided picture of {geometry.side}×{geometry.side}, PNDM\n"
    )
    print(HEADER)
    results = {}
    for name, build in (("Diffusers", diffusers_pipeline), ("Russet", russet_pipeline)):
        mac = VirtualMac(
            options.chip, memory_gib=options.memory, macos=options.macos, torch=options.torch, shapes_only=True
        )
        with mac:
            pipe = build(geometry).to("mps", dtype)
            if options.sliced:
                pipe.enable_attention_slicing()
            results[name] = measure(pipe, mac, geometry.side)
        print(row(name, results[name]))
    for name, result in results.items() if options.detail else ():
        print(f"\n{name}: " + ", ".join(f"{kernel} {times}" for kernel, times in result.unet.kernels.most_common()))


if __name__ == "__main__":
    main()
