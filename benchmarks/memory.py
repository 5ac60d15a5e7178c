"""Predicted peak memory beside the measured one on CUDA: Stable Diffusion 1.5's networks with random weights.

    python benchmarks/memory.py [--sizes 512x512 1024x1024 …] [--images 1 4 16] [--dtypes float16 float32]
                                [--offload] [--where] [--json FILE]

Measured is what torch's allocator has given out (``torch.cuda.max_memory_allocated``), phase by phase: text, denoising,
decoding. The last column is what it reserved for that. One step is made, and three where the UNet's calls are recorded
as graphs. Predicted is what the plan of that very call says; the last line says how many peaks are within a tenth. Of
float32 the largest batches are left out, since micro-batches make them the same as smaller ones and they take minutes;
the table says so. ``--offload`` measures model and sequential offload as well.

``--where`` lists for each network the stretches that were the widest; the phases' peaks are not measured then.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import russet
from russet.errors import DoesNotFit
from russet.generate.phase_times import Clock
from russet.planning import reference_models
from russet.planning.plan import Plan

WITHIN = 0.1
PHASES = ("text", "denoise", "decode")
SIZES = ("256x256", "512x512", "768x768", "1024x1024", "1536x1536", "2048x2048", "512x2048")
MOST_FLOAT32 = 8 * 1024 * 1024  # pixels of all images together
COLUMNS = ("precision", "picture", "images", "in the UNet", "decoded", "offload", *PHASES, "peak", "reserved")
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


class Watched(russet.StableDiffusionPipeline):
    """A pipeline that notes the most memory that each of its phases had, in bytes."""

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self.peaks: dict[str, int] = {}
        self.reserved = 0

    def start(self, spec: Any) -> Any:
        run = super().start(spec)
        run.clock = WatchedClock(self)
        return run


class WatchedClock(Clock):
    """A run's clock that also notes the most memory of each phase."""

    def __init__(self, pipe: Watched) -> None:
        super().__init__()
        self.pipe = pipe

    def enter(self, phase: str) -> None:
        super().enter(phase)
        torch.cuda.reset_peak_memory_stats()

    def pause(self) -> None:
        phase, pipe = self.phase, self.pipe
        super().pause()
        if phase is not None:
            pipe.peaks[phase] = max(pipe.peaks.get(phase, 0), torch.cuda.max_memory_allocated())
            pipe.reserved = max(pipe.reserved, torch.cuda.max_memory_reserved())


class Moments:
    """Looks at memory as each module begins and ends: which stretches between two such moments were the widest.

    A module's ``forward`` is wrapped, and no hook is set: hooks would keep the fused operations from being chosen.
    """

    def __init__(self, pipe: Watched) -> None:
        self.seen: dict[str, list[tuple[int, str]]] = {}
        self.inside: list[str] = []
        for owner, network in pipe.networks.items():
            for name, module in network.named_modules():
                module.forward = self.watched(owner, f"{type(module).__name__} {name}", module.forward)

    def watched(self, owner: str, name: str, forward: Any) -> Any:
        def look(*args: Any, **options: Any) -> Any:
            self.note(owner, f"before {name}")
            self.inside.append(name)
            output = forward(*args, **options)
            self.note(owner, f"end of {name}")
            self.inside.pop()
            return output

        return look

    def note(self, owner: str, until: str) -> None:
        where = f"{self.inside[-1] if self.inside else owner}, {until}; {mib(torch.cuda.memory_allocated())} then"
        self.seen.setdefault(owner, []).append((torch.cuda.max_memory_allocated(), where))
        torch.cuda.reset_peak_memory_stats()

    def report(self) -> Iterator[str]:
        for owner, seen in self.seen.items():
            for peak, where in sorted(seen, reverse=True)[:8]:
                yield f"    {owner}: {mib(peak)} in {where}"


def mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def pipeline(dtype: torch.dtype) -> Watched:
    """Random weights of the right shapes, made on the GPU."""
    torch.manual_seed(0)
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with torch.device("cuda"):
        networks = {
            "unet": russet.UNet2DConditionModel.from_config(reference_models.SD15_UNET),
            "vae": russet.AutoencoderKL.from_config({**reference_models.VAE, **levels, "scaling_factor": 0.18215}),
            "text_encoder": russet.CLIPTextModel.from_config(reference_models.CLIP_L),
        }
    parts = russet.DiffusionPipeline.from_pretrained("mini")
    networks = {name: network.to(dtype).requires_grad_(False) for name, network in networks.items()}
    pipe = Watched(**networks, tokenizer=parts.tokenizer, scheduler=parts.scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda", dtype)


def drawn(pipe: Watched, width: int, height: int, images: int) -> Plan:
    """One call, from an empty cache; its plan. ``pipe.peaks`` has what it took."""
    torch.cuda.synchronize()
    pipe.graphs.clear()
    torch.cuda.empty_cache()
    pipe.reserved, pipe.peaks = 0, {}
    recorded = pipe.plan(height=height, width=width, num_images=images)["cuda_graphs"]
    output = pipe(
        "a photo of an astronaut riding a horse on mars",
        height=height,
        width=width,
        num_images_per_prompt=images,
        num_inference_steps=3 if recorded else 1,
        output_type="pt",
        seed=0,
    )
    for note in output.notes:
        print(f"    note: {note}")
    assert output.plan is not None
    return output.plan


def compared(dtype: str, size: str, plan: Plan, pipe: Watched) -> dict[str, Any]:
    """One row as data: predicted and measured bytes by phase, and of the whole call."""
    predicted = {phase.name: phase.peak for phase in plan.estimate.phases}
    activations = {phase.name: phase.activations for phase in plan.estimate.phases}
    return {
        "dtype": dtype,
        "size": size,
        "images": plan.sizes.images,
        "micro_batch": plan.micro_batch,
        "vae": f"{plan.vae_batch} × {plan.vae_tile or 'whole'}",
        "offload": plan.offload,
        "predicted": {**predicted, "peak": plan.peak},
        "activations": activations,
        "graphs": plan["graphs"],
        "measured": {**pipe.peaks, "peak": max(pipe.peaks.values())},
        "reserved": pipe.reserved,
    }


def line(row: dict[str, Any]) -> str:
    """The row in Markdown: predicted / measured = ratio."""
    names = ("dtype", "size", "images", "micro_batch", "vae", "offload")
    cells = [str(row[name] if row[name] is not None else "none") for name in names]
    for phase in (*PHASES, "peak"):
        predicted, measured = row["predicted"][phase], row["measured"][phase]
        cells.append(f"{predicted / 1e9:.3f} / {measured / 1e9:.3f} = {predicted / measured:.3f}")
    return f"| {' | '.join(cells)} | {row['reserved'] / 1e9:.3f} |"


def works(sizes: list[str], images: list[int], dtype: str) -> Iterator[tuple[str, int, int, int]]:
    """What is drawn: (size in words, width, height, images)."""
    for size in sizes:
        width, height = map(int, size.split("x"))
        for count in images:
            if dtype == "float32" and width * height * count > MOST_FLOAT32:
                print(f"| {dtype} | {size} | {count} | left out |" + " |" * (len(COLUMNS) - 4), flush=True)
                continue
            yield size, width, height, count


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for dtype in options.dtypes:
        pipe = pipeline(getattr(torch, dtype))
        moments = Moments(pipe) if options.where else None
        drawn(pipe, 256, 256, 1)  # libraries take memory of their own when they are first used
        for mode in ("none", "model", "sequential") if options.offload else ("none",):
            if mode != "none":
                getattr(pipe, f"enable_{mode}_cpu_offload")(device="cuda")
            for size, width, height, count in works(options.sizes, options.images, dtype):
                if moments:
                    moments.seen = {}
                try:
                    plan = drawn(pipe, width, height, count)
                except DoesNotFit as error:
                    print(f"| {dtype} | {size} | {count} | {error} |" + " |" * (len(COLUMNS) - 4), flush=True)
                    continue
                rows.append(compared(dtype, size, plan, pipe))
                print(line(rows[-1]), flush=True)
                if moments:
                    print("\n".join(moments.report()), flush=True)
        del pipe, moments
        gc.collect()  # wrapped modules refer to themselves
    return rows


def verdict(rows: list[dict[str, Any]]) -> tuple[bool, str]:
    ratios = {
        f"{row['dtype']} {row['size']} × {row['images']}, offload {row['offload']}": row["predicted"]["peak"]
        / row["measured"]["peak"]
        for row in rows
    }
    good = [name for name, ratio in ratios.items() if abs(ratio - 1) <= WITHIN]
    worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
    words = f"{len(good)} of {len(ratios)} peaks are predicted within {WITHIN:.0%}; the worst is {worst}: "
    return len(good) == len(ratios), words + f"predicted / measured = {ratios[worst]:.3f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="WxH")
    parser.add_argument("--images", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "float32"], choices=("float16", "float32"))
    parser.add_argument("--offload", action="store_true", help="model and sequential offload as well")
    parser.add_argument("--where", action="store_true", help="the widest moments, and what layers take for themselves")
    parser.add_argument("--json", type=Path, help="write the rows there as JSON too")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if not torch.cuda.is_available():
        sys.exit("this needs a CUDA device; for a Mac without one there is benchmarks/mps_counts.py")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, GB predicted / measured = ratio\n")
    print(HEADER, flush=True)
    rows = measure(options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    good, words = verdict(rows)
    print(f"\n{words}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
