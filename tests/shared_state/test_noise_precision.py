"""``generator=`` draws the numbers that Diffusers draws: in the pipeline's precision. ``seed=`` draws in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import russet

HALVES = [
    torch.bfloat16,
    pytest.param(torch.float16, marks=pytest.mark.cpu_half),
]
SCHEDULERS = {
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    "DDIM with eta": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}, {"eta": 1.0}),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}, {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}, {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}, {}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "DPM++ 2S SDE": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "LCM": ("LCMScheduler", {}, {}),
    "TCD": ("TCDScheduler", {}, {}),
}
OPTIONS = {"num_inference_steps": 4, "output_type": "latent"}


def stream(seed: int = 7) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def both(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    diffusers = pytest.importorskip("diffusers")
    pipes = []
    for library in (diffusers, russet):
        pipe = library.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        pipes.append(pipe)
    return pipes[0], pipes[1]


def likeness(a: Any, b: Any) -> float:
    """The error of two latents, relative to their deviation."""
    return float((a.float() - b.float()).std() / a.float().std())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("images", [1, 2], ids=["one stream", "a stream each"])
def test_the_latents_are_those_that_diffusers_draws(
    images: int, name: str, dtype: torch.dtype, tiny_folder: Path
) -> None:
    """What is left is rounding; unrelated noise would leave an error of more than 1."""
    kind, changes, given = SCHEDULERS[name]
    pipes = both(tiny_folder, dtype)
    found = []
    for library, pipe in zip((pytest.importorskip("diffusers"), russet), pipes, strict=True):
        if not hasattr(library, kind):
            pytest.skip(f"no {kind} in {library.__name__}")
        pipe.scheduler = getattr(library, kind).from_config({**pipe.scheduler.config, **changes})
        streams = stream() if images == 1 else [stream(seed) for seed in range(images)]
        found.append(pipe(["a horse"] * images, generator=streams, **OPTIONS, **given).images)
    assert likeness(*found) < 0.1


class Draws(TorchFunctionMode):
    """Notes what is drawn by ``torch.randn``: shapes, precisions and devices. Half precision's numbers are not those of
    float32 on every device; that they are drawn alike is seen on any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], torch.dtype, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.randn:
            self.seen.append((tuple(made.shape), made.dtype, made.device.type))
        return made


def check_draws(theirs: Draws, ours: Draws) -> None:
    """At the end one of the two may also draw what it multiplies by zero."""
    assert abs(len(ours.seen) - len(theirs.seen)) <= 1
    assert all(mine == yours for mine, yours in zip(ours.seen, theirs.seen, strict=False))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_noise_of_a_picture_is_drawn_in_the_precision_that_diffusers_draws_in(
    name: str, dtype: torch.dtype, tiny_folder: Path
) -> None:
    kind, changes, given = SCHEDULERS[name]
    draws = []
    for library, pipe in zip((pytest.importorskip("diffusers"), russet), both(tiny_folder, dtype), strict=True):
        if not hasattr(library, kind):
            pytest.skip(f"no {kind} in {library.__name__}")
        pipe.scheduler = getattr(library, kind).from_config({**pipe.scheduler.config, **changes})
        with Draws() as seen:
            pipe("a horse", generator=stream(), **OPTIONS, **given)
        draws.append(seen)
    check_draws(*draws)
    assert draws[1].seen[0] == ((1, 4, 8, 8), dtype, "cpu")


def image_to_image(folder: Path, dtype: torch.dtype, library: Any) -> Any:
    pipe = library.StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("images", [1, 2], ids=["one stream", "a stream each"])
def test_image_to_image_samples_the_latents_of_its_picture_in_the_precision_of_diffusers(
    images: int, dtype: torch.dtype, tiny_folder: Path
) -> None:
    draws = []
    for library in (pytest.importorskip("diffusers"), russet):
        pipe = image_to_image(tiny_folder, dtype, library)
        streams = stream() if images == 1 else [stream(seed) for seed in range(images)]
        with Draws() as seen:
            pipe(["a horse"] * images, image=torch.rand(1, 3, 64, 64), generator=streams, **OPTIONS)
        draws.append(seen)
    assert {found for _, found, _ in draws[1].seen} == {dtype}
    check_draws(*draws)


@pytest.mark.parametrize("given", [{"seed": 7}, {}], ids=["seed", "nothing"])
def test_image_to_image_draws_a_seed_or_none_in_float32(given: dict[str, Any], tiny_folder: Path) -> None:
    pipe = image_to_image(tiny_folder, torch.bfloat16, russet)
    with Draws() as draws:
        pipe("a horse", image=torch.rand(1, 3, 64, 64), **given, **OPTIONS)
    assert {dtype for _, dtype, _ in draws.seen} == {torch.float32}


@pytest.mark.parametrize("given", [{"seed": 7}, {}], ids=["seed", "nothing"])
def test_a_seed_or_none_is_drawn_in_float32(given: dict[str, Any], tiny_folder: Path) -> None:
    _, pipe = both(tiny_folder, torch.bfloat16)
    pipe.scheduler = russet.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    with Draws() as draws:
        pipe("a horse", **given, **OPTIONS)
    assert {dtype for _, dtype, _ in draws.seen} == {torch.float32}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_starting_noise_is_bit_for_bit_that_of_torch_in_the_pipelines_precision(
    dtype: torch.dtype, tiny_folder: Path
) -> None:
    _, pipe = both(tiny_folder, dtype)
    noise = torch.randn(1, 4, 8, 8, generator=stream(), dtype=dtype, device="cpu")
    drawn = pipe("a horse", generator=stream(), **OPTIONS).images
    assert torch.equal(drawn, pipe("a horse", latents=noise, **OPTIONS).images)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_seed_stays_the_same_noise_in_every_precision(dtype: torch.dtype, tiny_folder: Path) -> None:
    _, pipe = both(tiny_folder, dtype)
    noise = torch.randn(1, 4, 8, 8, generator=stream(), device="cpu")
    drawn = pipe("a horse", seed=7, **OPTIONS).images
    assert torch.equal(drawn, pipe("a horse", latents=noise, **OPTIONS).images)


def test_in_float32_a_seed_and_its_generator_draw_the_same(tiny: Any) -> None:
    a, b = (tiny("a horse", **given, **OPTIONS).images for given in ({"seed": 7}, {"generator": stream()}))
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "PNDM"])
def test_a_users_own_loop_draws_what_diffusers_draws(name: str, dtype: torch.dtype) -> None:
    kind, changes, given = SCHEDULERS[name]
    found, draws = [], []
    for library in (pytest.importorskip("diffusers"), russet):
        if not hasattr(library, kind):
            pytest.skip(f"no {kind} in {library.__name__}")
        config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **changes}
        scheduler, noise = getattr(library, kind)(**config), stream()
        scheduler.set_timesteps(4)
        x = torch.ones(1, 4, 8, 8, dtype=dtype)
        with Draws() as seen:
            for t in scheduler.timesteps:
                x = scheduler.step(torch.zeros_like(x), t, x, generator=noise, **given).prev_sample
        found.append(x)
        draws.append(seen)
    check_draws(*draws)
    assert likeness(*found) < 0.1


def test_pictures_of_a_generator_in_half_precision_agree_with_diffusers(tiny_folder: Path, psnr: Any) -> None:
    theirs, ours = (
        pipe("a horse", generator=stream(), num_inference_steps=4, output_type="np").images
        for pipe in both(tiny_folder, torch.bfloat16)
    )
    assert isinstance(theirs, np.ndarray)
    assert psnr(theirs, ours) > 35
