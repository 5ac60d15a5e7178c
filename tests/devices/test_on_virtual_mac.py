"""Russet on virtual Macs of many kinds: the guide's program, the same pictures everywhere, limits, kernels, waits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from russet import DiffusionPipeline, PNDMScheduler, StableDiffusionPipeline
from russet.backends.layers import ComposedGroupNorm
from russet.backends.mps import frames_in_flight
from russet.hardware.facts import mac as written_mac
from russet.hardware.facts import read_facts
from russet.models.attention import chunked, upcast
from russet.models.clip_text import CLIPTextModel
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL
from russet.text.tokenizer import CLIPTokenizer

from .virtual_mps import Counts, VirtualMac
from .virtual_mps.kernels import version

MACS = {
    "M1 8 GB, macOS 13, torch 1.13": {"chip": "M1", "memory_gib": 8, "macos": "13.0", "torch": "1.13.1"},
    "M1 16 GB, macOS 13.6, torch 2.0": {"chip": "M1", "memory_gib": 16, "macos": "13.6", "torch": "2.0.1"},
    "M2 Pro 32 GB, macOS 14.5, torch 2.2": {"chip": "M2 Pro", "memory_gib": 32, "macos": "14.5", "torch": "2.2.2"},
    "M3 Max 64 GB, macOS 15, torch 2.5": {"chip": "M3 Max", "memory_gib": 64, "macos": "15.0", "torch": "2.5.1"},
    "M1 8 GB, macOS 14.5, torch 2.8": {"chip": "M1", "memory_gib": 8, "macos": "14.5", "torch": "2.8.0"},
    "M1 8 GB, macOS 14.5, torch 2.12": {"chip": "M1", "memory_gib": 8, "macos": "14.5", "torch": "2.12.1"},
    "M2 Ultra 192 GB, macOS 15.3, torch 2.13": {
        "chip": "M2 Ultra",
        "memory_gib": 192,
        "macos": "15.3",
        "torch": "2.13.0",
    },
    "M4 24 GB, macOS 26, torch 2.14": {"chip": "M4", "memory_gib": 24, "macos": "26.0", "torch": "2.14.0"},
}


def skip_newer(torch_version: str) -> None:
    """An old installed torch cannot stand for one that has attention of its own."""
    if version(torch.__version__) < (2, 0) <= version(torch_version):
        pytest.skip(f"needs torch 2, to be torch {torch_version}")


@pytest.fixture(params=MACS)
def kind(request) -> dict[str, Any]:
    skip_newer(MACS[request.param]["torch"])
    return MACS[request.param]


@pytest.fixture
def torch_version(request) -> str:
    skip_newer(request.param)
    return request.param


def mini(dtype: torch.dtype | None = None) -> Any:
    pipe = DiffusionPipeline.from_pretrained("mini", torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any, prompt: Any = "a red apple", steps: int = 2, seed: Any = 7, **options: Any) -> np.ndarray:
    """[B, 64, 64, 3] in 0..1."""
    return pipe(prompt, 64, 64, num_inference_steps=steps, seed=seed, output_type="np", **options).images


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(((a - b) ** 2).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """The picture of the CPU in float32."""
    return picture(mini(torch.float32))


# -- the guide


@pytest.mark.parametrize("name", ["M1 8 GB, macOS 13, torch 1.13", "M1 8 GB, macOS 14.5, torch 2.12"])
def test_the_guides_program_runs_as_it_stands(name):
    skip_newer(MACS[name]["torch"])
    with VirtualMac(**MACS[name]) as mac:
        pipe = DiffusionPipeline.from_pretrained("mini")
        pipe = pipe.to("mps")
        pipe.enable_attention_slicing()  # the guide: recommended below 64 GB
        prompt = "a photo of an astronaut riding a horse on mars"
        _ = pipe(prompt, num_inference_steps=1)  # the guide: a first pass on torch 1.13
        image = pipe(prompt, num_inference_steps=1).images[0]
        assert mac.account.total.kernel_count > 1000
    assert image.size == (256, 256)
    assert np.asarray(image).std() > 1


def test_the_watermark_is_lowered_before_the_device_is_used(monkeypatch):
    monkeypatch.delenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", raising=False)
    for torch_version in ("1.13.1", "2.4.1", "2.13.0"):  # from 2.5 on the working set is asked for, which starts it
        skip_newer(torch_version)
        with VirtualMac(memory_gib=8, torch=torch_version) as mac:
            mini().to("mps")
            assert mac.account.limit == mac.working_set


def test_facts_are_read_as_they_are_written_down(kind):
    with VirtualMac(**kind):
        read = read_facts()
    written = written_mac(**kind)
    for name in ("device", "chip", "chip_family", "memory", "working_set", "largest_buffer", "macos", "torch", "bf16"):
        assert getattr(read, name) == getattr(written, name), name


# -- the same picture


def test_float32_pictures_are_those_of_the_cpu(kind, expected):
    with VirtualMac(**kind):
        found = picture(mini(torch.float32).to("mps"))
    assert psnr(found, expected) > 90  # other attention, other order of sums


@pytest.mark.parametrize("torch_version", ["1.13.1", "2.5.1", "2.13.0"], indirect=True)
def test_half_precision_is_close_to_it(torch_version, expected):
    with VirtualMac(torch=torch_version, macos="14.5"):
        found = picture(mini().to("mps"))
    assert psnr(found, expected) > 40


@pytest.mark.parametrize(
    ("torch_version", "slicing"),
    [("1.13.1", "max"), ("2.12.1", "auto"), ("2.12.1", "max"), ("2.12.1", "off"), ("2.13.0", "max")],
    indirect=["torch_version"],
)
def test_slicing_is_never_nan_and_changes_nothing(slicing, torch_version, expected):
    with VirtualMac(torch=torch_version, macos="14.5"):
        pipe = mini(torch.float32).to("mps")
        pipe.disable_attention_slicing() if slicing == "off" else pipe.enable_attention_slicing(slicing)
        found = picture(pipe)
    assert psnr(found, expected) > 90


def test_a_list_of_prompts_gives_the_pictures_of_single_ones():
    prompts = {"a red apple": 3, "a blue cat": 4}
    with VirtualMac(memory_gib=8):
        pipe = mini(torch.float32).to("mps")
        together = picture(pipe, list(prompts), seed=list(prompts.values()))
        alone = np.concatenate([picture(pipe, prompt, seed=seed) for prompt, seed in prompts.items()])
    assert psnr(together, alone) > 90


def test_several_pictures_of_a_prompt_and_previews_of_them_are_drawn_on_torch_1_13_too():
    shown = []
    with VirtualMac(torch="1.13.1", macos="13.0"):
        pipe = mini(torch.float32).to("mps")

        def look(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            shown.extend(pipe.preview(tensors["latents"]))
            return tensors

        found = picture(pipe, num_images_per_prompt=2, callback_on_step_end=look)
    assert psnr(found[0], picture(mini(torch.float32))[0]) > 90
    assert len(shown) == 2 * 2


def test_noise_never_comes_from_the_device(expected):
    with VirtualMac():
        pipe = mini(torch.float32).to("mps")
        state = torch.mps.get_rng_state()
        picture(pipe)
        assert torch.equal(torch.mps.get_rng_state(), state)


# -- what it costs


def waits_by_steps(mac: VirtualMac, *numbers: int) -> dict[int, Any]:
    pipe, waits = mini().to("mps"), {}
    picture(pipe)  # the first one is looked at earlier
    for steps in numbers:
        with mac.measure() as counts:
            picture(pipe, steps=steps)
        waits[steps] = counts.syncs
    return waits


@pytest.mark.parametrize("torch_version", ["2.1.2", "2.13.0"], indirect=True)
def test_no_step_waits_for_the_device(torch_version):
    with VirtualMac(torch=torch_version, macos="14.5") as mac:
        waits = waits_by_steps(mac, 3, 4, 9, 21)
    assert waits[3] == waits[4] == waits[9] == waits[21]


@pytest.mark.parametrize("torch_version", ["1.13.1", "2.0.1"], indirect=True)
def test_before_torch_has_events_every_fifth_step_waits_to_look_for_overflow(torch_version):
    with VirtualMac(torch=torch_version, macos="13.6") as mac:
        waits = waits_by_steps(mac, 4, 9, 21)
        assert not mac.events
    assert [sum((waits[steps] - waits[4]).values()) for steps in (9, 21)] == [1, 4]


def test_a_picture_waits_for_the_device_in_one_step_until_one_was_drawn_well():
    waits = []
    with VirtualMac() as mac:
        pipe = mini().to("mps")
        pipe("a red apple", 64, 64, num_inference_steps=1, output_type="latent", seed=7)  # so that all is in its place
        for known in (None, torch.float16):
            pipe.finite_in = known
            with mac.measure() as counts:
                picture(pipe, steps=21)
            waits.append(counts.sync_count)
    assert waits[0] - waits[1] == 1


@pytest.mark.parametrize("late", [0, 3])
def test_the_host_stays_one_step_ahead_of_the_device(late):
    seen = []
    with VirtualMac(late_events=late) as mac:
        pipe = mini().to("mps")
        pipe.unet.register_forward_pre_hook(lambda *_: seen.append([event.come for event in mac.events]))
        picture(pipe, steps=5)
        asked = [event.asked for event in mac.events]
    assert seen == [[], [False], [True, False], [True, True, False], [True, True, True, False]]
    assert asked == [late + 1] * 4 + [0]


def test_events_that_never_come_do_not_stop_a_run(monkeypatch):
    monkeypatch.setattr(frames_in_flight, "PATIENCE", 0.0)
    with VirtualMac(late_events=10**9) as mac:
        found = picture(mini(torch.float32).to("mps"), steps=4)
        assert len(mac.events) == 2
    assert psnr(found, picture(mini(torch.float32), steps=4)) > 90


def test_an_interrupted_run_ends_after_that_step():
    calls = []
    with VirtualMac(late_events=2):
        pipe = mini().to("mps")
        pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))

        def stop(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe.interrupt = step == 2
            return tensors

        picture(pipe, steps=9, callback_on_step_end=stop)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("known", "good_calls", "calls"),
    [  # of 15 steps: all, then 5 in vain with attention in float32, then from the last good step to the end
        (True, 3, 15 + 5 + 15),
        (True, 8, 15 + 5 + 10),
        (True, 13, 15 + 5 + 5),
        (False, 3, 5 + 5 + 15),
        (False, 8, 15 + 5 + 10),
    ],
)
def test_the_end_tells_of_an_overflow_and_the_last_good_latents_go_on(known, good_calls, calls):
    called = []

    def break_late(unet: Any, args: Any, output: Any) -> Any:
        called.append(1)
        overflows = unet.dtype == torch.float16 and len(called) > good_calls
        return (output[0] * float("nan"),) if overflows else output

    with VirtualMac():
        pipe = mini(torch.float16).to("mps")
        pipe.finite_in = torch.float16 if known else None
        hook = pipe.unet.register_forward_hook(break_late)
        output = pipe("a red apple", 64, 64, num_inference_steps=15, seed=7, output_type="np")
        hook.remove()
        assert pipe.finite_in is None
    assert len(called) == calls
    assert "whole unet in float32" in output.notes[-1]
    assert psnr(output.images, picture(mini(torch.float32), steps=15)) > 35


def test_attention_in_pieces_puts_its_operands_in_order_once():
    with VirtualMac(torch="2.0.1", macos="13.6") as mac:
        q, k, v = (torch.randn(2, 32, 4, 8).half().to("mps").transpose(1, 2) for _ in range(3))
        copies = {}
        for attention in (chunked(8), upcast(chunked(8))):
            with mac.measure() as counts:
                attention(q, k, v, 0.5)
            copies[repr(attention)] = counts.kernels["clone"]
            assert counts.kernels["bmm"] == 2 * 4  # of queries
    assert list(copies.values()) == [3, 0]


def test_leaving_work_out_gives_the_cpus_picture_with_fewer_kernels_and_no_more_waits():
    options = {"steps": 6, "guidance_interval": (0, 0.6)}

    def less(pipe: Any) -> Any:
        pipe.enable_deep_cache(2, 1, start=0.2)
        return pipe

    wanted = picture(less(mini(torch.float32)), **options)
    with VirtualMac(chip="M1", memory_gib=16, macos="15.0", torch="2.5.1") as mac:
        pipe = mini(torch.float32).to("mps")
        with mac.measure() as whole:
            picture(pipe, steps=6)
        with mac.measure() as counted:
            found = picture(less(pipe), **options)
        assert pipe.preview(torch.zeros(1, 4, 8, 8))[0].size == (8, 8)
    assert psnr(found, wanted) > 60
    assert counted.kernel_count < 0.8 * whole.kernel_count
    assert sum(counted.syncs.values()) <= sum(whole.syncs.values())


def test_a_composed_group_norm_takes_a_few_operations():
    counted = {}
    for torch_version in ("2.1.2", "2.5.1", "2.12.1"):
        skip_newer(torch_version)
        with VirtualMac(torch=torch_version) as mac:
            norm = ComposedGroupNorm(8, 32).half().to("mps")
            x = torch.randn(2, 32, 16, 16).half().to("mps")
            with mac.measure() as counts, torch.no_grad():
                norm(x)
            counted[torch_version] = counts.kernel_count
    assert set(counted.values()) == {4}  # to float32, normalised, back, weighted


@pytest.mark.parametrize("kind_of_offload", ["model", "sequential"])
def test_offload_gives_the_same_picture_with_fewer_bytes_at_once(kind_of_offload, expected):
    with VirtualMac() as mac:
        pipe = mini(torch.float32).to("mps")
        with mac.measure() as everything:
            picture(pipe)
        del pipe
        pipe = mini(torch.float32)
        getattr(pipe, f"enable_{kind_of_offload}_cpu_offload")(device="mps")
        with mac.measure() as offloaded:
            found = picture(pipe)
        left = mac.account.live
    assert psnr(found, expected) > 90
    assert offloaded.peak < everything.peak
    assert left < everything.start / 10


def test_with_sequential_offload_a_hook_sees_every_call_and_without_one_the_deep_cache_works():
    seen: list[str] = []
    wanted = picture(mini(torch.float32), steps=4)
    with VirtualMac() as mac:
        pipe = mini(torch.float32)
        pipe.enable_deep_cache(2, start=0)
        pipe.enable_sequential_cpu_offload(device="mps")
        with mac.measure() as cached:
            output = pipe("a red apple", 64, 64, num_inference_steps=4, seed=7, output_type="np")
        assert output.notes == (), "the hooks that bring layers to the device are not the user's"
        pipe.unet.register_forward_hook(lambda unet, given, result: seen.append(result[0].device.type))
        with mac.measure() as hooked:
            found = picture(pipe, steps=4)
    assert psnr(output.images, wanted) < 60
    assert psnr(found, wanted) > 60
    assert seen == ["mps"] * len(pipe.scheduler.schedule(4).timesteps)
    assert cached.kernel_count < hooked.kernel_count


# -- Stable Diffusion 1.5 at full size, on shapes alone


def hollow(network: nn.Module) -> nn.Module:
    """Weights of the right shape that take no memory: one number each, seen many times."""
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    return network


@pytest.fixture(scope="module")
def stable_diffusion() -> Any:
    """A function that gives the pipeline of Stable Diffusion 1.5, without values."""
    from russet.checkpoints.load_state_dict import build

    tokenizer = CLIPTokenizer.from_files(Path(__file__).parents[2] / "src/russet/mini/tokenizer")
    unet = {"sample_size": 64, "cross_attention_dim": 768}
    vae = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}

    def made() -> Any:
        pipe = StableDiffusionPipeline(
            unet=hollow(build(UNet2DConditionModel, UNet2DConditionModel.config_class.from_dict(unet))),
            vae=hollow(build(AutoencoderKL, AutoencoderKL.config_class.from_dict(vae))),
            text_encoder=hollow(build(CLIPTextModel, CLIPTextModel.config_class.from_dict(text))),
            tokenizer=tokenizer,
            scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
            safety_checker=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe.to("mps", torch.float16)

    return made


def drawn(mac: VirtualMac, pipe: Any, height: int, width: int) -> Counts:
    with mac.measure() as counts:
        pipe("a cat", height=height, width=width, num_inference_steps=1, output_type="np", seed=0)
    return counts


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [
        ("M1 8 GB, macOS 14.5, torch 2.12", 1024, 1024),
        ("M2 Ultra 192 GB, macOS 15.3, torch 2.13", 512, 2048),
    ],
)
def test_no_size_meets_a_limit_and_the_predicted_peak_holds(name, height, width, stable_diffusion):
    skip_newer(MACS[name]["torch"])
    with VirtualMac(**MACS[name], shapes_only=True) as mac:
        pipe = stable_diffusion()
        plan = pipe.plan(height=height, width=width)
        counts = drawn(mac, pipe, height, width)
    assert 0.9 <= counts.peak / plan.peak <= 1.02


@pytest.mark.parametrize(
    ("torch_version", "macos", "side"),
    [
        ("1.13.1", "13.0", 512),
        ("2.0.1", "13.6", 512),
        ("2.5.1", "15.0", 512),
        ("2.5.1", "15.0", 1024),
        ("2.12.1", "14.4", 512),
        ("2.12.1", "15.0", 1024),
        ("2.13.0", "15.0", 1024),
        ("2.14.0", "15.0", 512),
    ],
    indirect=["torch_version"],
)
def test_three_gigabytes_are_enough_on_any_torch_beside_a_browser(torch_version, macos, side, stable_diffusion):
    with VirtualMac("M1", memory_gib=8, free_gib=3.5, torch=torch_version, macos=macos, shapes_only=True) as mac:
        counts = drawn(mac, stable_diffusion(), side, side)
    assert counts.peak <= 3.0e9


def last_call(mac: VirtualMac, pipe: Any, steps: int = 4) -> tuple[Counts, int]:
    """What the last UNet call of a picture did, and the bytes that were live before the picture: the weights."""
    calls = []

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        with mac.measure() as counts:
            output = nn.Module.__call__(self, *args, **options)
        calls.append(counts)
        return output

    pipe(
        "a cat", num_inference_steps=1, output_type="latent", seed=0
    )  # weights that lie side by side do so from now on
    weights = mac.account.live
    with pytest.MonkeyPatch.context() as patch:  # of the class: a network with a forward of its own is left alone
        patch.setattr(UNet2DConditionModel, "__call__", counted)
        pipe("a cat", num_inference_steps=steps, output_type="latent", seed=0)
    return calls[-1], weights


@pytest.mark.parametrize(
    ("dtype", "kernels", "mebibytes"), [(torch.float16, 480, 200), (torch.float32, 560, 200)], ids=str
)
def test_a_guided_unet_call_runs_few_kernels_and_takes_little_memory(dtype, kernels, mebibytes, stable_diffusion):
    skip_newer("2.13.0")
    with VirtualMac(shapes_only=True) as mac:
        counts, weights = last_call(mac, stable_diffusion().to(dtype))
    assert counts.sync_count == 0
    assert counts.kernel_count <= kernels
    assert counts.peak - weights <= mebibytes * 2**20  # with all that was made for the run


def test_without_fast_paths_a_call_keeps_nothing_and_runs_more_kernels(stable_diffusion):
    skip_newer("2.13.0")
    with VirtualMac(shapes_only=True) as mac:
        pipe = stable_diffusion()
        pipe.disable_fast_paths()
        counts, weights = last_call(mac, pipe)
    assert counts.kernel_count > 640
    assert counts.start - weights < 2**21  # latents and texts


# -- the same with fast paths and without


@pytest.mark.parametrize(
    ("torch_version", "macos", "dtype", "least"),
    [
        ("2.13.0", "15.0", torch.float32, 90),
        ("2.13.0", "15.0", torch.float16, 50),
        ("2.13.0", "14.6", torch.float16, 50),
        ("2.12.1", "15.0", torch.float16, 50),
        ("2.5.1", "15.0", torch.float32, 90),
    ],
    indirect=["torch_version"],
)
def test_fast_paths_change_no_picture(torch_version, macos, dtype, least):
    with VirtualMac(torch=torch_version, macos=macos):
        pipe = mini(dtype).to("mps")
        fast = picture(pipe, steps=4)
        pipe.disable_fast_paths()
        plain = picture(pipe, steps=4)
    assert psnr(fast, plain) > least


def test_a_text_that_overflows_in_the_weights_is_read_apart_from_them():
    with VirtualMac():
        pipe = mini(torch.float16).to("mps")
        block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
        for layer in (block.attn2.to_q, block.attn2.to_k):
            layer.weight.data.mul_(250)
        output = pipe("a red apple", 64, 64, num_inference_steps=3, seed=7, output_type="np")
        pipe.to(torch.float32)
        expected = picture(pipe, steps=3)
    assert "attention in float32" in output.notes[0]
    assert len(output.notes) == 1
    assert psnr(output.images, expected) > 30


@pytest.mark.parametrize("switched_off", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_time_that_comes_alone_keeps_its_biases_on_an_m1_with_macos_26(steps, switched_off):
    skip_newer("2.13.0")
    expected = picture(mini(torch.float32), steps=steps)
    with VirtualMac("M1", macos="26.1", torch="2.13.0"):
        pipe = mini(torch.float32).to("mps")
        if switched_off:
            pipe.disable_fast_paths()
        assert psnr(picture(pipe, steps=steps), expected) > 90


def test_tokens_of_several_rows_come_right_through_linear_layers_on_an_m5(expected):
    skip_newer("2.12.1")
    with VirtualMac("M5", macos="26.1", torch="2.12.1"):
        assert psnr(picture(mini().to("mps")), expected) > 40
