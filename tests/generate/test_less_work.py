"""What leaves work out on request: how much less is done, that nothing else changes, and how near the pictures stay."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import russet
from russet import passes
from russet.backends.cuda.graphs import Graphs
from russet.errors import ArgumentTypeError, InputError
from russet.generate.denoiser import UNetCall
from russet.generate.guidance import guidance_embedding
from russet.models.resnet import ResnetBlock2D
from russet.passes.base import Choices

FAST = {"num_inference_steps": 4, "output_type": "latent", "seed": 1}
INTERVALS = {"early": (0, 0.4), "late": (0.6, 1), "middle": (0.3, 0.7)}


class Count:
    """The UNet's calls while the block lasts: rows of each, residual blocks that ran before it, and those in all."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.blocks = unet, 0
        self.rows: list[int] = []
        self.times: list[float] = []
        self.blocks_before: list[int] = []

    def __enter__(self) -> Count:
        run = UNetCall._run

        def counted(call: UNetCall, x: Any, t: Any, *args: Any) -> Any:
            self.rows.append(len(call.context))
            self.times.append(float(t))
            self.blocks_before.append(self.blocks)
            return run(call, x, t, *args)

        def ran(*_: Any) -> None:
            self.blocks += 1

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(UNetCall, "_run", counted)
        kinds = (module for module in self.unet.modules() if isinstance(module, ResnetBlock2D))
        self.hooks = [module.register_forward_pre_hook(ran) for module in kinds]
        return self

    def __exit__(self, *_: Any) -> None:
        self.patch.undo()
        for hook in self.hooks:
            hook.remove()


def drawn(pipe: Any, prompt: Any = "a horse", **given: Any) -> np.ndarray:
    return pipe(prompt, **{**FAST, **given}).images.numpy()


@pytest.fixture(
    params=["DDIMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "RestartScheduler"]
)
def any_sampler(request: Any, tiny: Any) -> Iterator[Any]:
    tiny.scheduler = getattr(russet, request.param).from_config(tiny.scheduler.config)
    return tiny


# -- guidance in a part of the schedule


def test_an_interval_of_everything_draws_the_same_picture_to_the_bit(any_sampler: Any) -> None:
    assert np.array_equal(drawn(any_sampler), drawn(any_sampler, guidance_interval=(0, 1)))
    assert np.array_equal(drawn(any_sampler), drawn(any_sampler, guidance_interval=[0.0, 1]))


@pytest.mark.parametrize("interval", INTERVALS.values(), ids=INTERVALS)
def test_outside_of_the_interval_the_unet_sees_the_prompt_alone(interval: Any, any_sampler: Any) -> None:
    with Count(any_sampler.unet) as count:
        changed = drawn(any_sampler, guidance_interval=interval)
    guided = [interval[0] <= 1 - t / 999 <= interval[1] for t in count.times]
    assert count.rows == [2 if inside else 1 for inside in guided]
    assert {True, False} == set(guided)
    assert not np.allclose(changed, drawn(any_sampler))


def test_an_interval_without_a_step_draws_what_no_guidance_draws(tiny: Any) -> None:
    with Count(tiny.unet) as count:
        without = drawn(tiny, guidance_interval=(0.001, 0.002))
    assert set(count.rows) == {1}
    assert np.allclose(without, drawn(tiny, guidance_scale=1.0), rtol=1e-5, atol=1e-5)  # torch 1.13 adds otherwise


def test_the_interval_is_where_the_noise_is_and_not_a_number_of_steps(tiny: Any) -> None:
    for steps in (4, 10):
        with Count(tiny.unet) as count:
            drawn(tiny, num_inference_steps=steps, guidance_interval=(0.25, 0.75))
        assert count.rows == [2 if 249.75 <= t <= 749.25 else 1 for t in count.times]


def test_micro_batches_with_an_interval_draw_the_pictures_of_one_batch(tiny: Any, psnr: Any) -> None:
    prompts = ["a horse", "a cat", "a dog"]
    given = {"guidance_interval": (0, 0.5), "output_type": "np", "guidance_rescale": 0.5}
    whole = drawn_pictures(tiny, prompts, **given)
    tiny._choose(micro_batch=1)
    with Count(tiny.unet) as count:
        parts = drawn_pictures(tiny, prompts, **given)
    assert max(count.rows) == 2, "never more rows than the plan counts with"
    assert 2 in count.rows[-2:], "without guidance two pictures go into one call"
    assert psnr(whole, parts) > 60


def drawn_pictures(pipe: Any, prompt: Any, **given: Any) -> np.ndarray:
    return pipe(prompt, **{**FAST, **given}).images


@pytest.mark.parametrize(
    ("sampler", "plain"),
    [
        ("DDIMCFGPPScheduler", "DDIMScheduler"),
        ("EulerAncestralCFGPPScheduler", "EulerAncestralDiscreteScheduler"),
    ],
)
def test_a_sampler_that_needs_both_answers_is_its_plain_form_outside(sampler: str, plain: str, tiny: Any) -> None:
    tiny.scheduler = getattr(russet, sampler).from_config(tiny.scheduler.config)
    given = {"guidance_scale": 0.6}
    with Count(tiny.unet) as count:
        changed = drawn(tiny, guidance_interval=(0, 0.5), **given)
    assert set(count.rows) == {1, 2}
    assert np.isfinite(changed).all()
    never = drawn(tiny, guidance_interval=(0.001, 0.002), **given)
    tiny.scheduler = getattr(russet, plain).from_config(tiny.scheduler.config)
    np.testing.assert_allclose(never, drawn(tiny, guidance_scale=1.0), atol=1e-5)


def test_a_callback_may_change_the_scale_within_an_interval(tiny: Any) -> None:
    def weaker(pipe: Any, index: int, t: Any, tensors: Any) -> dict[str, Any]:
        pipe._guidance_scale = 3.0
        return {}

    with Count(tiny.unet) as count:
        changed = drawn(tiny, guidance_interval=(0, 0.5), callback_on_step_end=weaker)
    assert count.rows == [2 if t >= 499.5 else 1 for t in count.times]
    assert not np.allclose(changed, drawn(tiny, guidance_interval=(0, 0.5)))


@pytest.mark.parametrize(
    "interval", [(0.5, 0.5), (0.7, 0.2), (-0.1, 1), (0, 1.1), (0.5,), (0, 0.5, 1), (0, float("nan"))]
)
def test_an_interval_that_is_none_is_refused(interval: Any, tiny: Any) -> None:
    with pytest.raises(InputError, match="guidance_interval"):
        tiny("a horse", guidance_interval=interval)


@pytest.mark.parametrize("interval", [0.5, "0,1", ("a", "b"), True, {0.1, 0.5}])
def test_an_interval_of_another_type_is_refused(interval: Any, tiny: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="guidance_interval"):
        tiny("a horse", guidance_interval=interval)


# -- deep features kept from step to step


def test_a_cache_interval_of_one_draws_the_same_picture_to_the_bit(any_sampler: Any) -> None:
    plain = drawn(any_sampler)
    any_sampler.enable_deep_cache(1)
    assert np.array_equal(plain, drawn(any_sampler))


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_between_whole_calls_only_the_outermost_blocks_run(branch: int, any_sampler: Any) -> None:
    plain = drawn(any_sampler)
    with Count(any_sampler.unet) as whole:  # hooks keep blocks plain, which may change the last bits
        drawn(any_sampler)
    calls = len(whole.rows)
    any_sampler.enable_deep_cache(3, branch, start=0)
    with Count(any_sampler.unet) as count:
        changed = drawn(any_sampler)
    assert count.rows == whole.rows
    down = [0, 1, 1]  # of this UNet's maps, the second comes from a residual block and the third from a downsampler
    outside = branch + 1 + down[branch]
    full = -(-calls // 3)
    assert count.blocks == full * (whole.blocks // calls) + (calls - full) * outside
    assert not np.allclose(plain, changed)
    any_sampler.disable_deep_cache()
    assert np.array_equal(plain, drawn(any_sampler))


def test_before_its_start_every_call_is_whole(tiny: Any) -> None:
    tiny.enable_deep_cache(2, start=0.5)
    per_call = sum(isinstance(module, ResnetBlock2D) for module in tiny.unet.modules())
    with Count(tiny.unet) as count:
        drawn(tiny, num_inference_steps=10)
    seen = [*count.blocks_before, count.blocks]
    whole = [after - before == per_call for before, after in itertools.pairwise(seen)]
    early = sum(t > 499.5 for t in count.times)
    assert 0 < early < len(whole)
    assert whole[:early] == [True] * early
    assert whole[early:] == [number % 2 == 1 for number in range(len(whole) - early)]


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_pictures_with_a_cache_do_not_depend_on_the_batch(micro_batch: int, tiny: Any, psnr: Any) -> None:
    tiny.enable_deep_cache(3, 1, start=0)
    prompts = ["a horse", "a cat", "a dog"]
    given = {"output_type": "np", "guidance_interval": (0, 0.5)}
    whole = drawn_pictures(tiny, prompts, **given)
    tiny._choose(micro_batch=micro_batch)
    assert psnr(whole, drawn_pictures(tiny, prompts, **given)) > 60
    assert psnr(whole[1], drawn_pictures(tiny, "a cat", seed=2, output_type="np", guidance_interval=(0, 0.5))) > 60


def test_where_guidance_pauses_the_first_call_is_whole(tiny: Any) -> None:
    tiny.enable_deep_cache(10, start=0)
    per_call = sum(isinstance(module, ResnetBlock2D) for module in tiny.unet.modules())
    with Count(tiny.unet) as count:
        drawn(tiny, guidance_interval=(0.3, 0.7), num_inference_steps=9)
    crossings = sum(a != b for a, b in itertools.pairwise(count.rows))
    assert crossings == 2
    assert count.blocks == 3 * per_call + (len(count.rows) - 3)


def test_what_a_callback_changes_is_not_answered_from_old_features(tiny: Any) -> None:
    tiny.enable_deep_cache(100, start=0)
    other = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(3))

    def change(pipe: Any, index: int, t: Any, tensors: Any) -> dict[str, Any]:
        return {"prompt_embeds": other} if index == 2 else {}

    per_call = sum(isinstance(module, ResnetBlock2D) for module in tiny.unet.modules())
    with Count(tiny.unet) as count:
        drawn(tiny, callback_on_step_end=change)
    assert count.blocks == 2 * per_call + (len(count.rows) - 2)


def test_two_threads_keep_their_features_apart(tiny: Any) -> None:
    tiny.enable_deep_cache(2, start=0)
    prompts = ["a horse", "two cats on the moon"]
    alone = [drawn(tiny, prompt) for prompt in prompts]
    together: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        together[number] = drawn(tiny, prompts[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert np.array_equal(alone[number], together[number])


def test_sequential_offload_and_a_cache_draw_the_same_picture(tiny: Any) -> None:
    tiny.enable_deep_cache(2, 1, start=0)
    plain = drawn(tiny)
    tiny.enable_sequential_cpu_offload(device="cpu")
    assert np.allclose(plain, drawn(tiny), atol=1e-5)


class Wrapper(torch.nn.Module):
    """Somebody's module around the UNet, which counts its calls."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet, self.calls = unet, 0

    def forward(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        return self.unet(*given, **named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("unet"), name)


@pytest.mark.parametrize("cached", [False, True], ids=["", "with a cache"])
@pytest.mark.parametrize("offload", [False, True], ids=["", "layer by layer"])
def test_hooks_on_the_unet_see_every_call(offload: bool, cached: bool, tiny: Any, psnr: Any) -> None:
    if offload:
        tiny.enable_sequential_cpu_offload(device="cpu")
    plain = drawn_pictures(tiny, "a horse", output_type="np")
    if cached:
        tiny.enable_deep_cache(2, start=0)
    steps, seen = len(tiny.scheduler.schedule(4).timesteps), []
    hooks = [
        tiny.unet.register_forward_pre_hook(lambda *_: seen.append("before")),
        tiny.unet.register_forward_hook(lambda *_: seen.append("after")),
    ]
    output = tiny("a horse", **{**FAST, "output_type": "np"})
    assert seen == ["before", "after"] * steps
    assert psnr(output.images, plain) > 60, "every call is whole"
    assert any("deep cache" in note for note in output.notes) == cached
    for hook in hooks:
        hook.remove()
    with Count(tiny.unet) as count:
        output = tiny("a horse", **{**FAST, "output_type": "np"})
    per_call = sum(isinstance(module, ResnetBlock2D) for module in tiny.unet.modules())
    assert (count.blocks < steps * per_call) == cached, "the cache works again"
    assert output.notes == ()
    assert len(seen) == 2 * steps


def test_what_a_hook_makes_of_the_unets_output_is_used_with_a_cache_too(tiny: Any) -> None:
    tiny.enable_deep_cache(2, start=0)
    plain = drawn(tiny)
    hook = tiny.unet.register_forward_hook(lambda unet, given, output: (output[0] * 0.5,))
    changed = drawn(tiny)
    tiny.disable_deep_cache()
    assert np.array_equal(changed, drawn(tiny))
    hook.remove()
    assert not np.allclose(changed, plain)


@pytest.mark.parametrize("how", ["a module around it", "a forward of its own", "a subclass"])
def test_a_unet_that_somebody_wrapped_is_called_as_a_whole(
    how: str, tiny: Any, psnr: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, unet, asked = drawn_pictures(tiny, "a horse", output_type="np"), tiny.unet, []
    forward = type(unet).forward

    def asking(unet: Any, *given: Any, **named: Any) -> Any:
        asked.append(1)
        return forward(unet, *given, **named)

    if how == "a module around it":
        tiny.unet = Wrapper(unet)
    elif how == "a forward of its own":
        monkeypatch.setitem(vars(unet), "forward", functools.partial(asking, unet))
    else:
        monkeypatch.setattr(unet, "__class__", type("Somebodys", (type(unet),), {"forward": asking}))
    tiny.enable_deep_cache(2, start=0)
    output = tiny("a horse", **{**FAST, "output_type": "np"})
    calls = tiny.unet.calls if how == "a module around it" else len(asked)
    assert calls == len(tiny.scheduler.schedule(4).timesteps)
    assert psnr(output.images, plain) > 60
    assert any("deep cache" in note for note in output.notes)


@pytest.mark.cpu_half
def test_a_run_that_overflowed_begins_again_with_a_whole_call(
    tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = russet.DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None, torch_dtype=torch.float16)
    half.set_progress_bar_config(disable=True)
    half.enable_deep_cache(100, start=0)
    asked = []
    whole = UNetCall._run

    def break_once(*args: Any) -> Any:
        asked.append(args[-1] is None)
        output = whole(*args)
        return (output[0] * float("nan"), output[1]) if len(asked) == 7 else output

    monkeypatch.setattr(UNetCall, "_run", break_once)
    latents = drawn(half, num_inference_steps=8)
    assert np.isfinite(latents).all()
    calls = len(half.scheduler.schedule(8).timesteps)
    assert [number for number, whole in enumerate(asked) if whole] == [0, calls]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"interval": 0}, "interval must be at least 1"),
        ({"interval": 2.0}, "interval must be a whole number"),
        ({"branch": -1}, "branch must be at least 0"),
        ({"branch": 3}, "branch must be at most 2"),
        ({"start": 1.5}, "start must be at most 1"),
        ({"start": "early"}, "start must be a number"),
    ],
)
def test_a_cache_that_makes_no_sense_is_refused(given: Any, message: str, tiny: Any) -> None:
    with pytest.raises(InputError, match=message):
        tiny.enable_deep_cache(**given)
    assert tiny.deep_cache is None


class Replayed(Graphs):
    """Hands each call copies of its inputs, as a recording has them, and computes it plainly."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[Any] = []

    def run(self, name: Any, call: Any, inputs: Any) -> tuple[torch.Tensor, ...]:
        self.names.append(name)
        return call(*[x.clone() for x in inputs])  # type: ignore[no-any-return]


@pytest.mark.parametrize("prompt_cache", ["keys and values", "packed keys and values", "off"])
@pytest.mark.parametrize("width", [None, 24])
def test_a_recorded_call_is_given_all_that_a_plain_one_is(width: int | None, prompt_cache: str, tiny: Any) -> None:
    unet = type(tiny.unet)(tiny.unet.config, time_cond_proj_dim=width).requires_grad_(False)
    passes.apply(unet, "unet", Choices({**passes.OFF, "offload": None, "prompt_cache": prompt_cache}, rows=2))
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    rows = {"encoder_hidden_states": context}
    if width is not None:
        rows["timestep_cond"] = guidance_embedding(7.5, width).expand(2, -1)
    graphs, branches = Replayed(), len(unet.output_stages) - 1
    plain, recorded = (UNetCall(unet, rows, prompt_cache=prompt_cache, graphs=one) for one in (None, graphs))
    assert torch.equal(plain(x, 600.0), recorded(x, 600.0))
    for branch in range(branches):
        output, kept = plain.with_deep_map(x, 600.0, branch)
        assert all(map(torch.equal, recorded.with_deep_map(x, 600.0, branch), (output, kept)))
        moved = plain.with_deep_map(x + 1, 500.0, branch, kept)
        assert all(map(torch.equal, recorded.with_deep_map(x + 1, 500.0, branch, kept), moved))
    assert len(set(graphs.names)) == 1 + 2 * branches, "each kind of call is a recording of its own"


# -- how near the embedded model's pictures stay

NEAR = 35.0  # dB
MINI = {"num_inference_steps": 25, "guidance_scale": 5.0, "seed": 42, "output_type": "np"}
PROMPT = "a photo of an astronaut riding a horse on mars"


@pytest.fixture(scope="module")
def full(shared_mini: Any) -> Any:
    return shared_mini(PROMPT, **MINI).images


def test_the_cache_as_it_is_switched_on_keeps_the_pictures(mini: Any, full: Any, psnr: Any) -> None:
    mini.enable_deep_cache()
    assert psnr(mini(PROMPT, **MINI).images, full) > NEAR


def test_the_last_step_may_go_without_guidance(mini: Any, full: Any, psnr: Any) -> None:
    # The least that an interval can leave out of 25 steps. 34.6 dB; with the blurrier decoder of before it is 36.1.
    assert psnr(mini(PROMPT, guidance_interval=(0, 0.95), **MINI).images, full) > 34.0
