"""One full-size Stable Diffusion 1.5 UNet call, Russet beside Diffusers in one process.

    python benchmarks/unet.py [--rounds 3] [--size 64] [--batch 2]

Random weights, float32, CPU, all cores. The contestants take turns, so that whatever else the machine does meets them
alike; the table gives medians, and ratios to Diffusers in channels-last.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import diffusers
import torch

from russet.models.unet import UNet2DConditionModel

SD15 = {"sample_size": 64, "cross_attention_dim": 768}
BASELINE = "Diffusers, channels-last"


def contestants(batch: int, size: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The calls to be timed; all have the same weights and the same input."""
    reference = diffusers.UNet2DConditionModel(**SD15).eval().requires_grad_(False)
    reference_last = diffusers.UNet2DConditionModel(**SD15).eval().requires_grad_(False)
    reference_last.load_state_dict(reference.state_dict())
    reference_last.to(memory_format=torch.channels_last)
    ours = UNet2DConditionModel(SD15).requires_grad_(False)
    ours.load_state_dict(reference.state_dict())
    ours.to(memory_format=torch.channels_last)
    x, context = torch.randn(batch, 4, size, size), torch.randn(batch, 77, 768)
    x_last = x.to(memory_format=torch.channels_last)
    return {
        "Diffusers, as it ships": lambda: reference(x, 500, context).sample,
        BASELINE: lambda: reference_last(x_last, 500, context).sample,
        "Russet": lambda: ours(x_last, 500, context).sample,
    }


def measure(calls: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one call that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        expected = next(iter(calls.values()))()
        for name, call in calls.items():
            error = float((call() - expected).abs().max() / expected.abs().max())
            assert error < 1e-4, f"{name} differs by {error}"
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Medians, spreads and ratios in Markdown."""
    base = statistics.median(seconds[BASELINE])
    rows = ["| UNet call | median s | min–max s | ratio |", "|---|---|---|---|"]
    for name, values in seconds.items():
        median = statistics.median(values)
        rows.append(f"| {name} | {median:.2f} | {min(values):.2f}–{max(values):.2f} | {median / base:.2f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="side of the latents")
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    calls = contestants(options.batch, options.size)
    print(
        f"torch {torch.__version__}, Diffusers {diffusers.__version__}, {torch.get_num_threads()} threads, "
        f"batch {options.batch}, {options.size}×{options.size} latents, float32\n"
    )
    print(table(measure(calls, options.rounds)))


if __name__ == "__main__":
    main()
