from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from russet.errors import InputError
from russet.schedulers import named, solvers
from russet.schedulers.schedule import Passage
from russet.schedulers.scheduler import Scheduler

from .loops import SD, normal, wavy

ALL = [cls for cls in vars(named).values() if isinstance(cls, type) and hasattr(cls, "config_class")]


def make(cls: type[Scheduler], **changes: Any) -> Scheduler:
    return cls({**SD, "set_alpha_to_one": False}, **changes)


def finish(run: Passage) -> Tensor:
    while run.t is not None:
        output = wavy(run.model_input, run.t)
        run.send(output, output * 0.9 if run.schedule.needs_unconditional else None)
    return run.latents


class Counted:
    """Noise of its own stream; counts the draws."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.draws = 0

    def __call__(self) -> Tensor:
        self.draws += 1
        return torch.randn(2, 4, 8, 8, generator=self.generator)


@pytest.mark.parametrize("cls", ALL)
def test_a_run_and_the_step_protocol_give_the_same_latents(cls: type[Scheduler]) -> None:
    scheduler = make(cls)
    schedule = scheduler.schedule(9, **({"eta": 0.3} if cls is named.TCDScheduler else {}))
    x = normal(1) * schedule.init_noise_sigma
    wanted = finish(schedule.run(x, Counted()))
    scheduler.set_timesteps(9)
    assert torch.allclose(scheduler.timesteps.double(), torch.tensor(schedule.timesteps).double())
    assert scheduler.init_noise_sigma == schedule.init_noise_sigma
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        output = wavy(scheduler.scale_model_input(x, t), float(t))
        more = {"unconditional": output * 0.9} if cls.needs_unconditional else {}
        x = scheduler.step(output, t, x, generator=generator, **more).prev_sample
    assert torch.allclose(x, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.cpu_half
@pytest.mark.parametrize("cls", ALL)
def test_half_precision_latents_come_back_in_half_precision_and_close(cls: type[Scheduler]) -> None:
    schedule = make(cls).schedule(6)
    x = normal(1) * schedule.init_noise_sigma
    run = schedule.run(x.half(), Counted())
    assert run.model_input.dtype == run.latents.dtype == torch.float16
    half = finish(run)
    assert run.x0 is not None
    assert half.dtype == run.x0.dtype == torch.float16
    wanted = finish(schedule.run(x, Counted()))
    # the model sees its input rounded to 11 bits, in each of six steps
    assert (half.float() - wanted).norm() < 0.02 * wanted.norm()


class NothingReadBack(TorchDispatchMode):
    """Refuses what makes the host wait for a device, and what mps does not have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "a value is read back from the device"
        result = func(*args, **(kwargs or {}))
        assert not (isinstance(result, Tensor) and result.dtype == torch.float64), f"{func} makes float64"
        return result


@pytest.mark.parametrize("cls", ALL)
def test_no_step_reads_from_the_device_or_makes_float64(cls: type[Scheduler]) -> None:
    run = make(cls).schedule(5).run(normal(1), Counted())
    output = normal(2)
    with NothingReadBack():
        while run.t is not None:
            assert run.model_input.dtype == torch.float32
            run.send(output, output if run.schedule.needs_unconditional else None)
            assert run.latents.shape == output.shape


@pytest.mark.parametrize("cls", ALL)
def test_two_runs_of_one_scheduler_in_two_threads_do_not_disturb_each_other(cls: type[Scheduler]) -> None:
    scheduler = make(cls)
    alone = [finish(scheduler.schedule(7).run(normal(seed), Counted(seed))) for seed in range(2)]
    together: dict[int, Tensor] = {}
    turn = threading.Barrier(2, timeout=20)

    def work(seed: int) -> None:
        run = scheduler.schedule(7).run(normal(seed), Counted(seed))
        while run.t is not None:
            turn.wait()  # both are in the middle of a run at every step
            output = wavy(run.model_input, run.t)
            run.send(output, output * 0.9 if run.schedule.needs_unconditional else None)
        together[seed] = run.latents

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(torch.equal(together[seed], alone[seed]) for seed in range(2))


def test_a_class_of_ones_own_has_the_solver_that_it_names() -> None:
    for base in (named.EulerDiscreteScheduler, named.DDIMScheduler, named.UniPCMultistepScheduler):

        class Own(base, solver=solvers.heun):  # type: ignore[misc, valid-type]
            pass

        assert Own(**SD).schedule(5).solver is solvers.heun
        assert len(Own.from_config(base(**SD).config).schedule(5).timesteps) == 9


def test_a_class_of_ones_own_says_nothing_that_would_be_ignored() -> None:
    for row in ({"ordre": 2}, {"clip_sample": False}):
        with pytest.raises(TypeError, match=f"Own: {next(iter(row))} is neither an attribute of schedulers"):
            type("Own", (named.DDIMScheduler,), {}, **row)


def test_a_schedule_can_be_run_any_number_of_times() -> None:
    schedule = make(named.UniPCMultistepScheduler).schedule(5)
    first, second = (finish(schedule.run(normal(1), Counted())) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("cls", ALL)
def test_latents_replaced_between_steps_are_what_the_next_step_starts_from(cls: type[Scheduler]) -> None:
    if cls in (named.PNDMScheduler,):
        pytest.skip("its first calls belong to one step, which goes back to where it began")
    schedule = make(cls).schedule(6)
    if len(schedule.timesteps) != 6:
        pytest.skip("more than one call a step")
    plain, pushed = (schedule.run(normal(1), Counted()) for _ in range(2))
    output = normal(2)
    for run in (plain, pushed):
        for _ in range(2):
            run.send(output, output if schedule.needs_unconditional else None)
    pushed.latents = pushed.latents + 1.0
    assert torch.allclose(pushed.latents, plain.latents + 1.0, atol=1e-5)
    before = (pushed.latents - plain.latents).norm()
    for run in (plain, pushed):
        run.send(output, output if schedule.needs_unconditional else None)
    after = (pushed.latents - plain.latents).norm()
    if cls is not named.LCMScheduler:  # which keeps nothing of the latents but the image seen in them
        assert after > 0.1 * before


def test_the_noise_added_to_an_image_is_that_of_the_first_point() -> None:
    image, noise = normal(1), normal(2)
    for cls in (named.EulerDiscreteScheduler, named.DDIMScheduler):
        scheduler = make(cls)
        schedule = scheduler.schedule(20).start_at(8)
        wanted = scheduler.add_noise(image, noise, schedule.points[0].t)
        assert torch.allclose(schedule.add_noise(image, noise), wanted, atol=1e-5)
        run = schedule.run(wanted, Counted())
        assert torch.allclose(run.add_noise(image, noise), wanted, atol=1e-5)
        run.send(normal(3))
        wanted = scheduler.add_noise(image, noise, schedule.points[1].t)
        assert torch.allclose(run.add_noise(image, noise), wanted, atol=1e-5)


def test_a_run_started_late_makes_the_rest_of_the_steps() -> None:
    for cls, calls in ((named.EulerDiscreteScheduler, 3), (named.HeunDiscreteScheduler, 5)):
        schedule = make(cls).schedule(10)
        assert len(schedule.start_at(7).timesteps) == calls
        assert schedule.start_at(7).timesteps == schedule.timesteps[-calls:]
        for step in (-1, 10):
            with pytest.raises(InputError, match=f"cannot start at step {step}"):
                schedule.start_at(step)


def test_deterministic_samplers_draw_no_noise_and_the_others_do() -> None:
    drawn = {}
    for cls in ALL:
        noise = Counted()
        finish(make(cls).schedule(20).run(normal(1), noise))
        drawn[cls.__name__] = noise.draws
    stochastic = {name for name, draws in drawn.items() if draws}
    assert stochastic == {
        "DDPMScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepAncestralScheduler",
        "EulerAncestralCFGPPScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerChurnScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "LCMScheduler",
        "RestartScheduler",
    }
    assert drawn["DPMSolverSDEScheduler"] == 1  # for the seeds of its paths


def test_cfgpp_goes_on_with_the_unguided_noise() -> None:
    """One step of algorithm 2 of arXiv:2406.08070, written out for the variance-preserving latents of DDIM."""
    schedule = named.DDIMCFGPPScheduler(**SD, clip_sample=False).schedule(10).start_at(4)
    a, b = schedule.points[:2]
    x, guided, free = normal(1), normal(2), normal(3)
    run = schedule.run(x, Counted())
    run.send(guided, free)
    scale = [(1 + point.sigma**2) ** -0.5 for point in (a, b)]
    image = (x - a.sigma * scale[0] * guided) / scale[0]
    assert torch.allclose(run.latents, scale[1] * image + b.sigma * scale[1] * free, atol=1e-5)
    same = named.DDIMScheduler(**SD, clip_sample=False).schedule(10).start_at(4).run(x, Counted())
    same.send(guided)
    assert not torch.allclose(same.latents, run.latents, atol=1e-2)


def test_the_unguided_output_is_asked_for_by_cfgpp_and_by_no_other() -> None:
    for cls, more in ((named.EulerCFGPPScheduler, ()), (named.EulerDiscreteScheduler, (normal(2),))):
        run = make(cls).schedule(3).run(normal(1), Counted())
        with pytest.raises(InputError, match=r"CFG\+\+"):
            run.send(normal(2), *more)


def test_restart_goes_back_up_within_the_number_of_steps_asked_for() -> None:
    schedule = named.RestartScheduler(**SD, restart_times=2).schedule(24)
    levels = [point.sigma for point in schedule.points]
    jumps = [after for before, after in pairwise(levels) if after > before]
    assert len(schedule.points) == 24
    assert jumps == pytest.approx([2.0, 2.0])
    scheduler = named.RestartScheduler(**SD, restart_times=2)
    assert sorted(set(scheduler.starts(schedule))) == scheduler.starts(
        schedule
    )  # each step begins at a call of its own
    few = named.RestartScheduler(**SD).schedule(5)
    assert [point.sigma for point in few.points] == sorted((p.sigma for p in few.points), reverse=True)


def test_churn_raises_the_noise_of_each_step_but_the_first() -> None:
    plain = make(named.EulerDiscreteScheduler).schedule(10)
    churned = make(named.EulerChurnScheduler, s_churn=2.0, s_tmin=1.0).schedule(10)
    for number, (a, b) in enumerate(zip(plain.points, churned.points, strict=True)):
        raised = number > 0 and a.sigma >= 1.0
        assert b.sigma == pytest.approx(a.sigma * (1.2 if raised else 1.0))


def test_a_finished_run_takes_nothing_more() -> None:
    run = make(named.DDIMScheduler).schedule(1).run(normal(1), Counted())
    run.send(normal(2))
    assert run.t is None
    with pytest.raises(InputError, match="the schedule has ended"):
        run.send(normal(2))


def test_an_output_of_another_shape_is_refused_before_anything_changes() -> None:
    run = make(named.DDIMScheduler).schedule(2).run(normal(1), Counted())
    for output in (normal(2, 2, 8, 8, 8), normal(2, 1, 4, 8, 8)):
        with pytest.raises(InputError, match=r"the model's output is .* latents are \[2, 4, 8, 8\]"):
            run.send(output)
    finish(run)


def test_latents_of_whole_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="floating-point"):
        make(named.DDIMScheduler).schedule(2).run(torch.zeros(1, 4, 8, 8, dtype=torch.long), Counted())
