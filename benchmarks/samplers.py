"""How far a sampler is from the truth after so many model calls: prints tables, and draws docs/assets/samplers.svg.

    python benchmarks/samplers.py [--svg docs/assets/samplers.svg]        (matplotlib draws it; about a minute)
    python benchmarks/samplers.py --mini        (the embedded model's pictures instead; about a quarter of an hour)

The model is exact: the data is a mixture of Gaussians in 16 dimensions, of which the mean of the data given a noisy
point is known, and with it the noise. As a network is, it is told the timestep and not the noise level, so that a
rounded timestep costs what it costs. The noise levels are those of Stable Diffusion.

Samplers that draw no noise all start from the same noise, are guided by 7.5 to a part of the data, and are held to
where the probability-flow equation leads: the median over 256 points of the distance, relative to the right answer's
length. Those that draw noise have no one right answer. Unguided, they are held to the data: the energy distance between
2000 samples of theirs and 4000 of its own.

With --mini the pictures are the embedded model's: the peak signal-to-noise ratio against 50 steps of dpm2_karras.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from russet.rng import Noise
from russet.schedulers import multistep, names
from russet.schedulers.noise_levels import Point, polyexponential
from russet.schedulers.scheduler import Scheduler

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}
DIMENSIONS, POINTS, DRAWN, FRESH = 16, 256, 2000, 4000
CALLS = (5, 7, 10, 14, 20, 28, 40, 56, 80)
SHOWN = (10, 20, 40)  # in the tables
SHOWN_MINI = (10, 15, 20, 30)
FLOOR = 6e-4  # an energy distance that so many samples cannot tell from none
GUIDANCE = 7.5
OWN_SPACING = ("ddim", "pndm", "plms", "ddpm")  # in the plot; the others have Karras' noise levels there
DETERMINISTIC = (
    *("euler", "ddim", "heun", "dpm2", "lms", "pndm", "plms", "ipndm", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m"),
    *("unipc", "unipc_bh2", "deis"),
)
STOCHASTIC = (
    *("euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"),
    *("euler_churn", "restart", "ddpm", "dpmpp_2m"),
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Mixture:
    """Six Gaussians of different widths, the whole of about unit variance."""

    def __init__(self) -> None:
        self.means = torch.randn(6, DIMENSIONS, generator=generator(1)) * 0.9
        self.deviations = torch.tensor([0.15, 0.25, 0.3, 0.4, 0.5, 0.6])
        self.weights = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.2, 0.1])

    def samples(self, count: int, seed: int) -> Tensor:
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator(seed))
        spread = torch.randn(count, DIMENSIONS, generator=generator(seed + 1))
        return self.means[which] + self.deviations[which, None] * spread

    def denoised(self, x: Tensor, sigma: float, parts: slice = slice(None)) -> Tensor:
        """The mean of the data, or of some of its parts, given x = x0 + sigma * eps."""
        means, deviations = self.means[parts].to(x), self.deviations[parts].to(x)
        variances = deviations**2 + sigma**2
        away = x[:, None] - means
        weights = self.weights[parts].to(x)
        likelihood = weights.log() - DIMENSIONS / 2 * variances.log() - (away**2).sum(-1) / (2 * variances)
        guesses = means + (deviations**2 / variances)[:, None] * away
        return (torch.softmax(likelihood, 1)[..., None] * guesses).sum(1)

    def guided(self, x: Tensor, sigma: float) -> Tensor:
        """Classifier-free guidance towards two of the six."""
        free = self.denoised(x, sigma)
        return free + GUIDANCE * (self.denoised(x, sigma, slice(1, 3)) - free)


DATA = Mixture()
Denoised = Callable[[Tensor, float], Tensor]


def exact(noise: Tensor, high: float, low: float = 1e-3) -> Tensor:
    """Where the probability-flow equation leads from ``high * noise``, in float64 and 600 steps of the third order."""
    *points, end = (Point(0.0, float(sigma)) for sigma in polyexponential(601, low, high))
    method, orders = multistep.Exponential("heun"), [1, 2, 3] * 200
    x = high * noise.double()
    steps = multistep.singlestep(x, points, end, Noise(lambda: x), method, orders)
    try:
        x, point = next(steps)
        while True:
            x, point = steps.send((x, DATA.guided(x, point.sigma)))
    except StopIteration as finished:
        return DATA.guided(finished.value, low).float()


def as_model(scheduler: Scheduler, model_input: Tensor, t: float, denoised: Denoised) -> Tensor:
    """The noise in the model's input, by an exact model that knows the timestep alone."""
    sigma = scheduler.table.sigma(t)
    x = as_points(model_input) * math.sqrt(1 + sigma**2)
    return as_latents((x - denoised(x, sigma)) / sigma)


def as_latents(points: Tensor) -> Tensor:
    """[N, D] → one image [1, D, N, 1]: its pixels are the points."""
    return points.T[None, :, :, None]


def as_points(latents: Tensor) -> Tensor:
    return latents[0, :, :, 0].T


def steps_for(scheduler: Scheduler, calls: int) -> int:
    """The most steps that take at most so many model calls; at least one."""
    steps = calls
    while steps > 1 and len(scheduler.schedule(steps).timesteps) > calls:
        steps -= 1
    return steps


def drawn(name: str, calls: int, noise: Tensor, denoised: Denoised) -> tuple[Tensor, int]:
    """What a sampler makes of the noise in at most ``calls`` model calls (at least one step), and how many it made."""
    scheduler = names.make(name, SD)
    schedule = scheduler.schedule(steps_for(scheduler, calls))
    source = generator(9)
    x = as_latents(noise) * schedule.init_noise_sigma
    run = schedule.run(x, lambda: torch.randn(x.shape, generator=source))
    while run.t is not None:
        run.send(as_model(scheduler, run.model_input, run.t, denoised))
    return as_points(run.latents), len(schedule.timesteps)


def inside(x: Tensor) -> float:
    """The mean distance of two different samples of a set."""
    return float(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)))


@functools.cache
def flow() -> tuple[Tensor, Tensor]:
    """The noise that all start from, and where it leads."""
    noise = torch.randn(POINTS, DIMENSIONS, generator=generator(3))
    return noise, exact(noise, names.make("ddim", SD).table.sigma(999))


@functools.cache
def data() -> tuple[Tensor, float]:
    fresh = DATA.samples(FRESH, seed=20)
    return fresh, inside(fresh)


def error_of_path(name: str, calls: int) -> tuple[int, float]:
    noise, wanted = flow()
    x, made = drawn(name, calls, noise, DATA.guided)
    return made, float(((x - wanted).norm(dim=1) / wanted.norm(dim=1)).median())


def error_of_samples(name: str, calls: int) -> tuple[int, float]:
    """The energy distance to the data: zero on average where the samples are the data's own kind."""
    x, made = drawn(name, calls, torch.randn(DRAWN, DIMENSIONS, generator=generator(5)), DATA.denoised)
    fresh, spread = data()
    return made, max(2 * float(torch.cdist(x, fresh).mean()) - inside(x) - spread, FLOOR)


Curve = list[tuple[int, float]]


def curves(samplers: Sequence[str], measure: Callable[[str, int], tuple[int, float]]) -> dict[str, Curve]:
    """Errors by model calls, of each sampler with its own spacing and with Karras' noise levels."""
    found: dict[str, Curve] = {}
    for sampler in samplers:
        for name in (sampler, f"{sampler}_karras"):
            found[name] = [measure(name, calls) for calls in CALLS]
            print(".", end="", file=sys.stderr, flush=True)
    return found


def table(title: str, found: dict[str, Curve], floor: float = 0.0) -> str:
    """Markdown: a row for each sampler, the errors with its own spacing and with Karras' noise levels."""
    calls = [CALLS.index(count) for count in SHOWN]
    head = " | ".join(f"{count} calls{kind}" for kind in ("", ", Karras") for count in SHOWN)
    lines = [f"| {title} | {head} |", "|---|" + "---:|" * (2 * len(SHOWN))]
    for name in [name for name in found if not name.endswith("_karras")]:
        both = [found[key][index][1] for key in (name, f"{name}_karras") for index in calls]
        lines.append(" | ".join([f"| `{name}`", *(f"< {floor}" if e <= floor else f"{e:.2g}" for e in both)]) + " |")
    return "\n".join(lines)


def draw(paths: dict[str, Curve], samples: dict[str, Curve], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "samplers", "font.size": 11})
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    panels = (
        (axes[0], paths, DETERMINISTIC, "guided: distance from the exact answer (relative)"),
        (axes[1], samples, STOCHASTIC, "energy distance between samples and data"),
    )
    for axis, found, shown, label in panels:
        wanted = [name if name in OWN_SPACING else f"{name}_karras" for name in shown]
        wanted.sort(key=lambda name: -found[name][CALLS.index(20)][1])
        colours = pyplot.get_cmap("turbo")
        for number, name in enumerate(wanted):
            counts, errors = zip(*found[name], strict=True)
            style = {"color": colours(0.05 + 0.9 * number / (len(wanted) - 1)), "marker": "osD^v"[number % 5]}
            axis.loglog(counts, errors, label=name, markersize=4.5, linewidth=1.5, **style)
        axis.set(xlabel="model calls", ylabel=label)
        axis.set_xticks(CALLS, [str(count) for count in CALLS])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(file, metadata={"Date": None})


def pictures() -> str:
    """Markdown: how close the embedded model's pictures are to those of many steps, in dB."""
    from russet import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("mini")
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config

    def made(name: str, calls: int) -> Tensor:
        pipe.scheduler = names.make(f"{name}_karras", config)
        how = {
            "num_inference_steps": steps_for(pipe.scheduler, calls),
            "guidance_scale": 5,
            "seed": 42,
            "output_type": "pt",
        }
        return pipe(["a cat on the moon", "a red car", "a cup of coffee"], **how).images

    wanted = made("dpm2", 99)
    head = " | ".join(f"{count} calls" for count in SHOWN_MINI)
    lines = [f"| Karras' noise levels | {head} |", "|---|" + "---:|" * len(SHOWN_MINI)]
    for name in (name for name in DETERMINISTIC if name not in OWN_SPACING):
        errors = [float(((made(name, calls) - wanted) ** 2).mean()) for calls in SHOWN_MINI]
        lines.append(" | ".join([f"| `{name}`", *(f"{-10 * math.log10(error):.1f} dB" for error in errors)]) + " |")
        print(".", end="", file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--svg", type=Path, default=Path("docs/assets/samplers.svg"))
    arguments.add_argument("--mini", action="store_true")
    given = arguments.parse_args()
    if given.mini:
        print("\n" + pictures())
        return
    paths, samples = curves(DETERMINISTIC, error_of_path), curves(STOCHASTIC, error_of_samples)
    print("\n" + table("no noise drawn", paths) + "\n\n" + table("noise drawn", samples, FLOOR))
    draw(paths, samples, given.svg)


if __name__ == "__main__":
    main()
