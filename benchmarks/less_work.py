"""What leaving work out costs in quality: prints tables, and draws docs/assets/less-work.svg.

    python benchmarks/less_work.py [--svg docs/assets/less-work.svg]     (matplotlib draws it; half an hour on one core)

The embedded model draws four prompts with its own sampler, 25 steps and guidance 5; every way of doing less draws them
from the same noise. Quality is the PSNR of the decoded pictures against those of the full run, the lowest and the mean
of the four. Work is counted and not timed: the floating-point operations of all UNet calls (convolutions, linear layers
and attention), relative to the full run. What a call costs that starts from older features is counted for Stable
Diffusion 1.5 as well, at 512×512 and without computing anything.

Samplers for distilled models are given few steps of the embedded one, which is not distilled; there the measure is how
many of seven backgrounds have the colour that the prompt asks for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import backgrounds
from russet import DiffusionPipeline, UNet2DConditionModel
from russet.checkpoints.load_state_dict import build
from russet.generate.denoiser import UNetCall
from russet.planning.reference_models import SD15_UNET
from russet.schedulers import names

PROMPTS = (
    "a photo of an astronaut riding a horse on mars",
    "a cat on the moon",
    "a red apple on a table",
    "two dogs in the sea",
)
SETTINGS = {"num_inference_steps": 25, "guidance_scale": 5.0, "seed": 42, "output_type": "pt"}
INTERVALS = ((0, 0.95), (0, 0.9), (0, 0.8), (0, 0.6), (0.05, 1), (0.2, 0.8))
CACHES = (
    *((every, 0, start) for start in (0, 0.3, 0.4, 0.5) for every in (2, 3, 5)),
    *((every, 2, 0.4) for every in (2, 3)),
)
STEPS = (22, 20, 17, 13)
FEW_SAMPLERS, FEW_STEPS = ("ddim", "lcm", "tcd"), (1, 2, 4, 8)


class Found(NamedTuple):
    """PSNR in dB, the lowest and the mean of the pictures, and the work relative to the full run."""

    lowest: float
    mean: float
    work: float


class Model:
    """The embedded model, and what its full run draws and costs."""

    def __init__(self) -> None:
        self.pipe = DiffusionPipeline.from_pretrained("mini")
        self.pipe.set_progress_bar_config(disable=True)
        # The counter does not see oneDNN's layers: with a CPU's fast paths it misses more than half of the operations.
        self.pipe.disable_fast_paths()
        self.full, self.cost = self.draw()

    def draw(self, prompts: Sequence[str] = PROMPTS, **changes: Any) -> tuple[torch.Tensor, int]:
        """The pictures [B, 3, H, W] in 0..1, and the operations of all UNet calls."""
        counted = 0
        pipe, call = self.pipe, self.pipe.unet.forward

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            with FlopCounterMode(display=False) as counter:
                output = call(*args, **kwargs)
            counted += counter.get_total_flops()
            return output

        pipe.unet.forward = counting
        try:
            pictures = pipe(list(prompts), **{**SETTINGS, **changes}).images
        finally:
            del pipe.unet.forward
        print(".", end="", file=sys.stderr, flush=True)
        return pictures, counted

    def compare(self, **changes: Any) -> Found:
        pictures, cost = self.draw(**changes)
        errors = (pictures.double() - self.full.double()).square().flatten(1).mean(dim=1).clamp(min=1e-12)
        decibels = -10 * errors.log10()
        return Found(float(decibels.min()), float(decibels.mean()), cost / self.cost)

    def cached(self, every: int, branch: int, start: float, **changes: Any) -> Found:
        self.pipe.enable_deep_cache(every, branch, start)
        try:
            return self.compare(**changes)
        finally:
            self.pipe.disable_deep_cache()

    def right_backgrounds(self, sampler: str, steps: int) -> int:
        """Of one prompt for each colour, how many pictures have that colour along their border."""
        before = self.pipe.scheduler
        self.pipe.scheduler = names.make(sampler, before.config)
        try:
            pictures, _ = self.draw(backgrounds.PROMPTS, num_inference_steps=steps)
        finally:
            self.pipe.scheduler = before
        return backgrounds.right(pictures)


def operations(unet: UNet2DConditionModel, latents: torch.Tensor, text: torch.Tensor, *deep: Any) -> tuple[int, Any]:
    """Operations and output of a whole call, or of one at a branch, from an older deep map where there is one."""
    call = UNetCall(unet, {"encoder_hidden_states": text})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = call.with_deep_map(latents, 500.0, *deep)
    return counter.get_total_flops(), output


def costs_of_reuse(unet: UNet2DConditionModel, size: int, device: str) -> list[float]:
    """For each branch, the operations of a call that starts from an older map, relative to a whole call."""
    latents = torch.zeros(2, 4, size, size, device=device)
    text = torch.zeros(2, 77, unet.config.text_features or 0, device=device)
    whole, _ = operations(unet, latents, text)
    found = []
    for branch in range(len(unet.output_stages) - 1):
        _, (_, kept) = operations(unet, latents, text, branch)
        found.append(operations(unet, latents, text, branch, kept)[0] / whole)
    return found


def rows(found: Mapping[str, Found]) -> list[str]:
    return [f"| {name} | {f.lowest:.1f} | {f.mean:.1f} | {f.work:.0%} |" for name, f in found.items()]


def table(title: str, found: Mapping[str, Found]) -> str:
    head = [f"| {title} | lowest PSNR, dB | mean PSNR, dB | UNet work |", "|---|---:|---:|---:|"]
    return "\n".join([*head, *rows(found)])


def table_of_few(model: Model) -> str:
    lines = ["| sampler | " + " | ".join(f"{steps} steps" for steps in FEW_STEPS) + " |", "|---|---:|---:|---:|---:|"]
    for sampler in FEW_SAMPLERS:
        right = [model.right_backgrounds(sampler, steps) for steps in FEW_STEPS]
        lines.append(f"| `{sampler}` | " + " | ".join(map(str, right)) + " |")
    return "\n".join([*lines, f"\nthe full run: {model.right_backgrounds('ddim', 25)} of {len(backgrounds.PROMPTS)}"])


def table_of_reuse(mini: Sequence[float], sd: Sequence[float]) -> str:
    lines = ["| branch | embedded model | SD 1.5 |", "|---|---:|---:|"]
    for branch, share in enumerate(sd):
        lines.append(f"| {branch} | {f'{mini[branch]:.0%}' if branch < len(mini) else '–'} | {share:.0%} |")
    return "\n".join(lines)


def named(values: Sequence[Any], measure: Callable[..., Found]) -> dict[str, Found]:
    return {str(value).strip("()"): measure(value) for value in values}


def measured(model: Model) -> dict[str, dict[str, Found]]:
    """Title → what each setting gives."""
    both = {"0, 0.95 and deep cache 2, 0, 0.4": model.cached(2, 0, 0.4, guidance_interval=(0, 0.95))}
    return {
        "fewer steps": named(STEPS, lambda steps: model.compare(num_inference_steps=steps)),
        "guidance interval": named(INTERVALS, lambda interval: model.compare(guidance_interval=interval)),
        "deep cache: interval, branch, start": named(CACHES, lambda cache: model.cached(*cache)),
        "guidance interval and deep cache": both,
    }


def draw(found: Mapping[str, Mapping[str, Found]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "less work", "font.size": 11})
    figure, axis = pyplot.subplots(figsize=(9, 5.4), layout="constrained")
    steps, intervals, caches, both = found.values()
    late = {name: value for name, value in intervals.items() if name.startswith("0, ")}
    early = {name: value for name, value in intervals.items() if not name.startswith("0, ")}
    lines = [("fewer steps", steps, "k--s"), ("guidance not in the last steps", late, "C0-o")]
    lines += [("guidance not in the first steps", early, "C0:o")]
    for start, colour in (("0", "C3"), ("0.3", "C1"), ("0.4", "C5"), ("0.5", "C2")):
        chosen = {name: f for name, f in caches.items() if name.endswith(f", 0, {start}")}
        lines.append((f"deep cache from {start}, branch 0", chosen, colour + "-D"))
    lines.append(("deep cache from 0.4, branch 2", {n: f for n, f in caches.items() if ", 2, " in n}, "C5:^"))
    lines.append(("both", both, "C4*"))
    for label, points, style in lines:
        ordered = sorted(points.values(), key=lambda f: f.work)
        axis.plot([f.work for f in ordered], [f.lowest for f in ordered], style, label=label, markersize=5)
    axis.axhline(35, color="grey", linewidth=1)
    axis.set(
        xlabel="UNet work, of the full run's", ylabel="PSNR against the full run, the lowest of four pictures (dB)"
    )
    axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axis.grid(alpha=0.25)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--svg", type=Path, default=Path("docs/assets/less-work.svg"))
    file = arguments.parse_args().svg
    model = Model()
    found = measured(model)
    print("\n" + "\n\n".join(table(title, values) for title, values in found.items()))
    draw(found, file)
    print("\n" + table_of_few(model))
    sd15 = build(UNet2DConditionModel, UNet2DConditionModel.config_class.from_dict(SD15_UNET))
    print("\n" + table_of_reuse(costs_of_reuse(model.pipe.unet, 32, "cpu"), costs_of_reuse(sd15, 64, "meta")))


if __name__ == "__main__":
    main()
