"""A run whose numbers stop being finite goes on in more precise arithmetic, and says so."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import russet
from russet.generate import overflow
from russet.generate.conditioning import Conditioning
from russet.generate.guidance import Guidance
from russet.generate.sampling import DenoisingLoop
from russet.rng import NoiseSource

pytestmark = pytest.mark.cpu_half

LIMIT = 65504.0  # the largest float16
FAST = {"num_inference_steps": 7, "output_type": "np", "seed": 1}


def wavy(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.sin(x * 1.3 + t / 300) * 0.8 + x * 0.3


@pytest.mark.parametrize("broken", range(0, 24, 3))
@pytest.mark.parametrize("name", ["Euler", "EulerAncestral", "Heun", "KDPM2", "Restart", "DDIM"])
def test_a_run_that_goes_on_from_a_snapshot_ends_where_it_would_have(name: str, broken: int) -> None:
    """Of solvers that remember no earlier step, whatever call the overflow is found in."""
    cls = getattr(
        russet, "DDIMScheduler" if name == "DDIM" else f"{name}{'' if name == 'Restart' else 'Discrete'}Scheduler"
    )
    schedule = cls(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").schedule(24)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * schedule.init_noise_sigma

    def latents(breaks: bool) -> tuple[torch.Tensor, list[float]]:
        asked: list[float] = []

        def predict(x: torch.Tensor, t: float) -> torch.Tensor:
            asked.append(t)
            return wavy(x, t) * (float("nan") if breaks and len(asked) == broken + 1 else 1)

        loop = DenoisingLoop(
            schedule,
            Conditioning({"encoder_hidden_states": torch.zeros(1, 1, 1)}),
            Guidance(1.0),
            finite_checks="immediate",
            fallbacks=[overflow.Fallback("same again", "float32")],
            build=lambda *_: predict,
            at_work=lambda *_: contextlib.nullcontext(),
            trusted=True,
        )
        noise = NoiseSource((torch.Generator().manual_seed(1),), (1, 4, 8, 8), torch.device("cpu"), torch.float32)
        steps = [step.index for step in loop.steps(noise, start, lambda: False)]
        assert steps[-1] == loop.total - 1
        return loop.latents, asked

    wanted, calls = latents(breaks=False)
    found, asked = latents(breaks=True)
    assert torch.equal(found, wanted)
    assert calls == list(schedule.timesteps)
    assert 0 < len(asked) - len(calls) < 20, "only the calls since the last snapshot are made again"


@pytest.fixture
def half(tiny_folder: Path) -> Any:
    """The tiny pipeline in float16 with weights of its own."""
    pipe = russet.DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None, torch_dtype=torch.float16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_float32(pipe: Any) -> Any:
    whole = type(pipe)(**pipe.components, requires_safety_checker=False)
    whole.set_progress_bar_config(disable=True)
    images = whole.to(torch.float32)("a horse", **FAST).images
    whole.to(torch.float16)
    return images


def test_an_overflowing_unet_goes_on_in_float32_and_says_so(half: Any, caplog: Any, psnr: Any) -> None:
    for block in half.unet.down_blocks:
        for resnet in block.resnets:
            resnet.conv2.bias.data.fill_(LIMIT)
    wanted = in_float32(half)
    with caplog.at_level(logging.WARNING, "russet"):
        output = half("a horse", **FAST)
    assert psnr(wanted, output.images) > 30  # text and decoding stay in half precision
    assert [("unet's attention" in note, "whole unet" in note) for note in output.notes] == [
        (True, False),
        (False, True),
    ]
    assert "not finite" in caplog.text
    assert half.unet.dtype == torch.float16


def test_an_overflowing_vae_decodes_in_float32_and_says_so(half: Any, psnr: Any) -> None:
    half.vae.decoder.up_blocks[0].resnets[0].conv2.bias.data.fill_(LIMIT)
    half.vae.decoder.up_blocks[0].resnets[1].conv2.bias.data.fill_(LIMIT)
    wanted = in_float32(half)
    output = half("a horse", **FAST)
    assert psnr(wanted, output.images) > 30
    assert "whole vae in float32" in output.notes[-1]
    assert half.vae.dtype == torch.float16


def test_an_overflow_in_the_middle_goes_on_from_the_last_good_latents(half: Any, psnr: Any) -> None:
    calls: list[float] = []

    def break_late(unet: Any, args: Any, output: Any) -> Any:
        calls.append(float(args[1]))
        return (output[0] * float("nan"),) if unet.dtype == torch.float16 and len(calls) >= 7 else output

    wanted = half("a horse", **FAST).images
    hook = half.unet.register_forward_hook(break_late)
    output = half("a horse", **FAST)
    hook.remove()
    assert len(output.notes) == 2
    assert calls[0] not in calls[7:], "the first steps were good and must not be made again"
    assert psnr(wanted, output.images) > 25


def test_steps_made_again_are_guided_as_they_were(half: Any, psnr: Any) -> None:
    """A callback has switched guidance off since; steps before that are made again with it."""
    half.finite_in = torch.float16
    rows: list[int] = []

    def halve(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index != 6:
            return {}
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}

    def break_late(unet: Any, args: Any, output: Any) -> Any:
        rows.append(len(output[0]))
        broken = unet.dtype == torch.float16 and len(rows) >= 7
        return (output[0] * float("nan"),) if broken else output

    kinds = {"callback_on_step_end": halve, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    call = FAST | kinds | {"num_inference_steps": 9, "num_images_per_prompt": 2}
    wanted = half("a horse", **call).images
    hook = half.unet.register_forward_hook(break_late)
    output = half("a horse", **call)
    hook.remove()
    assert len(output.notes) == 2
    assert psnr(wanted, output.images) > 25


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        ("immediate", [(True, 5), (True, 10), (False, 10)]),
        ("deferred", [(True, 0), (True, 5), (True, 10), (False, 10)]),
        ("at the end", [(True, 0), (True, 0), (True, 0), (True, 0), (False, 10)]),
    ],
)
def test_a_check_is_read_when_it_is_due_and_the_last_finite_snapshot_is_known(reads: str, expected: list[Any]) -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, float("inf")])
    asked_then = Conditioning({"encoder_hidden_states": good}), Guidance()
    places = [overflow.Snapshot(step, good if step <= 10 else bad, [], *asked_then) for step in (0, 5, 10, 15, 20)]
    monitor, found = overflow.FiniteMonitor(places[0], reads, trusted=True), []
    for place in places[1:]:
        found.append((monitor.check(place), monitor.finite.step))
        if not found[-1][0]:
            break
    else:
        found.append((monitor.end(bad), monitor.finite.step))
    assert found == expected


def test_the_noise_of_a_repeated_step_is_the_same_noise(half: Any, psnr: Any) -> None:
    half.scheduler = russet.EulerAncestralDiscreteScheduler.from_config(half.scheduler.config)
    wanted = half("a horse", **FAST).images
    broken = half.unet.register_forward_hook(
        lambda unet, args, output: (output[0] * float("nan"),) if unet.dtype == torch.float16 else output
    )
    output = half("a horse", **FAST)
    broken.remove()
    assert psnr(wanted, output.images) > 25


def test_damaged_weights_end_in_a_note_and_a_working_pipeline(tiny_folder: Path) -> None:
    pipe = russet.DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    whole = pipe.unet.conv_out.bias.data.clone()
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    output = pipe("a horse", **FAST)
    assert "not finite even in float32" in output.notes[0]
    assert np.isfinite(output.images).all()
    pipe.unet.conv_out.bias.data.copy_(whole)
    assert pipe("a horse", **FAST).notes == ()
