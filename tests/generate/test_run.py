"""A run owns the state of its call: it is iterated, cancelled, asked for its result, and disturbs no other."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import russet
from russet.errors import DoesNotFit, InputError
from russet.families.sd import Prompts
from russet.generate.run import current_run
from russet.generate.spec import CallbackSpec, GuidanceSpec, NoiseSpec, SamplingSpec, Spec
from russet.generate.starts import NoiseStart

FAST = {"num_inference_steps": 4, "output_type": "np"}


def spec(prompt: str = "a horse", **changes: Any) -> Spec:
    given: dict[str, Any] = {
        "prompts": Prompts(prompt=prompt),
        "sampling": SamplingSpec(steps=4),
        "noise": NoiseSpec(seed=1),
        "output_type": "np",
    }
    return Spec(**{**given, **changes})


@pytest.fixture
def ddim(tiny: Any) -> Any:
    tiny.scheduler = russet.DDIMScheduler.from_config(tiny.scheduler.config)
    return tiny


@contextlib.contextmanager
def calls_of(network: Any) -> Iterator[list[int]]:
    """Counts calls while the block lasts; a hook left on networks that tests share would change other tests."""
    calls: list[int] = []
    hook = network.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


def test_a_run_that_was_started_has_computed_nothing_and_has_a_plan(ddim: Any) -> None:
    hooks = [n.register_forward_pre_hook(lambda *_: pytest.fail("a network ran")) for n in ddim.networks.values()]
    run = ddim.start(spec())
    for hook in hooks:
        hook.remove()
    assert run.plan.workload.rows == 2
    assert run.num_timesteps == 4
    run.close()


def test_iterating_gives_each_step_and_the_result_is_that_of_the_call(ddim: Any) -> None:
    run = ddim.start(spec())
    steps = list(run)
    assert [(step.index, step.total) for step in steps] == [(i, 4) for i in range(4)]
    assert [step.t for step in steps] == list(ddim.scheduler.schedule(4).timesteps)
    assert {step.x0.shape for step in steps} == {step.latents.shape for step in steps} == {(1, 4, 8, 8)}
    output = run.result()
    assert np.array_equal(output.images, ddim("a horse", seed=1, **FAST).images)
    assert output is run.result()
    assert list(output.times) == ["text", "denoise", "decode"]


def test_time_between_two_steps_is_not_counted(ddim: Any) -> None:
    run = ddim.start(spec())
    next(run)
    before = dict(run.clock.seconds)
    assert run.clock.phase is None
    threading.Event().wait(0.3)
    assert run.clock.seconds == before
    run.close()


def test_a_wrong_spec_is_refused_when_the_run_is_started(ddim: Any) -> None:
    with pytest.raises(InputError, match="height"):
        ddim.start(spec(height=60))
    with pytest.raises(InputError, match="latents"):
        ddim.start(spec(start=NoiseStart(given=torch.zeros(1, 4, 8, 9))))
    with pytest.raises(DoesNotFit):
        ddim.start(spec(height=2**20, width=2**20))
    with pytest.raises(InputError, match="guidance_rescale"):
        spec(guidance=GuidanceSpec(rescale=2.0))


def test_gradients_are_as_the_caller_has_them_between_two_steps(ddim: Any) -> None:
    run = ddim.start(spec())
    with torch.enable_grad():
        for _ in run:
            assert torch.is_grad_enabled()
        assert run.result() is not None
        assert torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_latents_and_guidance_may_be_changed_between_two_steps_as_by_a_callback(ddim: Any) -> None:
    def change(pipe: Any, index: int, t: Any, tensors: Any) -> dict[str, Any]:
        pipe._guidance_scale = 3.0
        return {"latents": tensors["latents"] * 0.9}

    wanted = ddim("a horse", seed=1, callback_on_step_end=change, **FAST).images
    run = ddim.start(spec())
    for step in run:
        run.guidance_scale = 3.0
        run.latents = step.latents * 0.9
    assert np.array_equal(run.result().images, wanted)


# -- the end of a run


def test_a_cancelled_run_makes_no_further_step_and_still_has_a_picture(ddim: Any) -> None:
    run = ddim.start(spec(sampling=SamplingSpec(steps=9)))
    with calls_of(ddim.unet) as calls:
        for step in run:
            if step.index == 1:
                run.cancel()
    assert len(calls) == 2
    assert run.result().images.shape == (1, 64, 64, 3)


def test_a_run_may_be_cancelled_from_another_thread_while_text_is_encoded(ddim: Any) -> None:
    run = ddim.start(spec())
    hook = ddim.text_encoder.register_forward_pre_hook(lambda *_: in_a_thread(run.cancel))
    with calls_of(ddim.unet) as calls:
        output = run.result()
    hook.remove()
    assert calls == []
    assert output.images.shape == (1, 64, 64, 3)


def in_a_thread(function: Any) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_interrupting_the_pipeline_from_elsewhere_ends_the_open_runs_and_no_later_one(ddim: Any) -> None:
    first, second = ddim.start(spec()), ddim.start(spec("a cat"))
    next(first)
    in_a_thread(lambda: setattr(ddim, "_interrupt", True))
    assert list(first) == list(second) == []
    assert ddim.interrupt
    assert len(list(ddim.start(spec()))) == 4
    first.close()
    second.close()


def test_interrupting_from_a_callback_ends_that_run_alone(ddim: Any) -> None:
    def stop(pipe: Any, index: int, t: Any, tensors: Any) -> None:
        pipe._interrupt = index == 1

    other = ddim.start(spec("a cat"))
    next(other)
    run = ddim.start(spec(callback=CallbackSpec(function=stop)))
    assert len(list(run)) == 2
    assert len(list(other)) == 3


def test_a_callback_that_clears_the_interruption_does_not_undo_a_cancellation(ddim: Any) -> None:
    def go_on(pipe: Any, index: int, t: Any, tensors: Any) -> None:
        pipe.interrupt = False

    run = ddim.start(spec(callback=CallbackSpec(function=go_on)))
    next(run)
    run.cancel()
    assert list(run) == []


def test_a_run_that_failed_says_so_when_it_is_asked_for_its_result(ddim: Any) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    run = ddim.start(spec(callback=CallbackSpec(function=fail)))
    with pytest.raises(KeyboardInterrupt):
        run.result()
    with pytest.raises(InputError, match="start another"):
        run.result()
    assert ddim("a horse", seed=1, **FAST).images.shape == (1, 64, 64, 3)


def test_a_run_that_nobody_holds_any_more_is_gone(ddim: Any) -> None:
    run = ddim.start(spec())
    next(run)
    gone = weakref.ref(run)
    del run
    gc.collect()
    assert gone() is None
    assert not ddim._open


# -- runs beside each other


def test_runs_that_take_turns_make_what_each_makes_alone(ddim: Any) -> None:
    specs = [spec(), spec("a cat", guidance=GuidanceSpec(scale=3.0), width=72)]
    alone = [ddim.start(one).result().images for one in specs]
    runs = [ddim.start(one) for one in specs]
    for _ in range(4):
        for run in runs:
            next(run)
    for run, picture in zip(runs, alone, strict=True):
        assert np.array_equal(run.result().images, picture)


def test_a_callback_may_generate_with_the_pipeline_that_called_it(ddim: Any) -> None:
    seen: list[tuple[float, int, float]] = []
    wanted = ddim("a horse", seed=1, guidance_scale=4.0, **FAST).images
    inner_wanted = ddim("a cat", seed=2, guidance_scale=1.0, num_inference_steps=2, output_type="np").images

    def inner(pipe: Any, index: int, t: Any, tensors: Any) -> None:
        seen.append((pipe.guidance_scale, pipe.num_timesteps, float(pipe.do_classifier_free_guidance)))

    def outer(pipe: Any, index: int, t: Any, tensors: Any) -> None:
        picture = pipe(
            "a cat", seed=2, guidance_scale=1.0, num_inference_steps=2, output_type="np", callback_on_step_end=inner
        ).images
        assert np.array_equal(picture, inner_wanted)
        assert (pipe.guidance_scale, pipe.num_timesteps) == (4.0, 4)

    output = ddim("a horse", seed=1, guidance_scale=4.0, callback_on_step_end=outer, **FAST)
    assert np.array_equal(output.images, wanted)
    assert seen == [(1.0, 2, 0.0)] * 8
    assert current_run(ddim) is None


def test_threads_with_callbacks_keep_their_guidance_apart(ddim: Any) -> None:
    scales = [1.5, 4.0, 9.0]
    alone = [ddim("a horse", seed=1, guidance_scale=scale, **FAST).images for scale in scales]
    together: dict[float, Any] = {}

    def work(scale: float) -> None:
        def look(pipe: Any, *_: Any) -> None:
            assert pipe.guidance_scale == scale

        together[scale] = ddim("a horse", seed=1, guidance_scale=scale, callback_on_step_end=look, **FAST).images

    threads = [threading.Thread(target=work, args=(scale,)) for scale in scales]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scale, picture in zip(scales, alone, strict=True):
        assert np.array_equal(together[scale], picture)


@pytest.mark.parametrize("steps", [None, 2], ids=["to its end", "closed half-way"])
def test_what_an_ended_run_kept_is_freed_at_once(ddim: Any, steps: int | None) -> None:
    gc.collect()
    gc.disable()  # a GPU's memory fills before the collector comes round
    try:
        run = ddim.start(spec())
        for _ in range(steps or 0):
            next(run)
        if steps is None:
            run.result()
        run.close()
        kept = weakref.ref(run), weakref.ref(run._loop), weakref.ref(run._loop.conditioning)
        del run
        assert [one() for one in kept] == [None, None, None]
    finally:
        gc.enable()
