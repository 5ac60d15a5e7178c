"""What a picture of Stable Diffusion 1.5 costs an M1: no more than docs/en/benchmarks.md publishes.

The page's numbers are a promise to its readers, so they are read from there. They are counted as
``benchmarks/mps_counts.py --full`` counts them, through public names alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import russet

from ..devices.virtual_mps import Counts, VirtualMac
from ..devices.virtual_mps.kernels import version

ROOT = Path(__file__).parents[2]
UNET = {"sample_size": 64, "cross_attention_dim": 768}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
FEW, MANY = 4, 8  # steps of two runs: what a step costs is their difference, divided by that of the steps


def hollow(cls: Any, config: dict[str, Any]) -> Any:
    """A network with weights of the right shape that take no memory: one number each, seen many times."""
    with torch.device("meta"):
        network = cls.from_config(config)
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    return network.eval()


def stable_diffusion() -> Any:
    pipe = russet.StableDiffusionPipeline(
        unet=hollow(russet.UNet2DConditionModel, UNET),
        vae=hollow(russet.AutoencoderKL, VAE),
        text_encoder=hollow(russet.CLIPTextModel, TEXT),
        tokenizer=russet.DiffusionPipeline.from_pretrained("mini").components["tokenizer"],
        scheduler=russet.PNDMScheduler(**SCHEDULER, skip_prk_steps=True),
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("mps", torch.float16)


def measured() -> dict[str, float]:
    """The numbers of one row of the table, by their column."""
    calls, runs = [Counts()], {}
    with VirtualMac("M1", memory_gib=16, macos="15.0", torch="2.13.0", shapes_only=True) as mac:
        pipe = stable_diffusion()

        def generate(steps: int) -> None:
            pipe("a cat", num_inference_steps=steps, seed=0, output_type="np")

        generate(1)  # weights may be rearranged once
        weights = mac.account.live

        def counted(self: nn.Module, *args: Any, **options: Any) -> Any:
            with mac.measure() as calls[0]:
                return nn.Module.__call__(self, *args, **options)

        with pytest.MonkeyPatch.context() as patch:  # of the class: a network with a forward of its own is left alone
            patch.setattr(russet.UNet2DConditionModel, "__call__", counted)
            for steps in (FEW, MANY):
                with mac.measure() as runs[steps]:
                    generate(steps)
    few, many = runs[FEW], runs[MANY]
    return {
        "kernels a UNet call": calls[0].kernel_count,
        "views": sum(calls[0].views.values()),
        "MiB over weights": (calls[0].peak - weights) / 2**20,
        "kernels a step": (many.kernel_count - few.kernel_count) / (MANY - FEW),
        "waits a step": (many.sync_count - few.sync_count) / (MANY - FEW),
        "uploads a step": (many.syncs["upload"] - few.syncs["upload"]) / (MANY - FEW),
        "MiB, whole run": max(few.extra, many.extra) / 2**20,
    }


def published() -> dict[str, str]:
    """The row of Russet in the page's table of counts, by column, as it is printed."""
    page = (ROOT / "docs" / "en" / "benchmarks.md").read_text(encoding="utf-8")
    table = page.partition("<!-- mps counts: begin")[2].partition("<!-- mps counts: end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    (row,) = [row for row in rows if row[0] == "Russet"]
    return dict(zip(rows[0][1:], row[1:], strict=True))


@pytest.mark.skipif(version(torch.__version__) < (2, 0), reason="this torch cannot stand for torch 2.13")
def test_a_picture_costs_no_more_than_the_page_on_benchmarks_publishes():
    found, printed = measured(), published()
    assert found.keys() == printed.keys()
    rounded = {name: round(found[name], len(cell.partition(".")[2])) for name, cell in printed.items()}
    more = {name: (rounded[name], cell) for name, cell in printed.items() if rounded[name] > float(cell)}
    assert not more, f"(counted, published): {more}"


def test_the_page_publishes_no_wait_at_most_480_kernels_and_194_mebibytes():
    """The page may be written anew, with better numbers only: a wait idles the GPU, a kernel costs the host time."""
    printed = {name: float(cell) for name, cell in published().items()}
    assert printed["waits a step"] == printed["uploads a step"] == 0
    assert printed["kernels a UNet call"] <= 480
    assert printed["MiB over weights"] <= 194
