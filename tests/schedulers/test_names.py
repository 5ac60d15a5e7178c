from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from russet.errors import ArgumentTypeError, InputError
from russet.schedulers import names

from .loops import SD, normal


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("euler", ("euler", None)),
        ("Euler a", ("euler_a", None)),
        ("euler_ancestral", ("euler_a", None)),
        ("EULER A KARRAS", ("euler_a", "karras")),
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("dpmpp_2m_karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Heun Exponential", ("dpmpp_2m_sde_heun", "exponential")),
        ("DPM++ 2S a", ("dpmpp_2s_a", None)),
        ("DPM2 a Karras", ("dpm2_a", "karras")),
        ("DPM++ SDE", ("dpmpp_sde", None)),
        ("  dpmpp-2m   sgm uniform ", ("dpmpp_2m", "sgm_uniform")),
        ("uni_pc_bh2", ("unipc_bh2", None)),
        ("Euler CFG++", ("euler_cfgpp", None)),
        ("euler_ancestral_cfg_pp", ("euler_a_cfgpp", None)),
        ("Euler Align Your Steps", ("euler", "align_your_steps")),
        ("euler_ays_xl", ("euler", "align_your_steps_xl")),
        ("DDIM", ("ddim", None)),
        ("euler normal", ("euler", "linspace")),
        ("euler ddim_uniform", ("euler", "leading")),
    ],
)
def test_names_of_a1111_and_comfyui_are_understood(name: str, wanted: tuple[str, str | None]) -> None:
    assert names.parse(name) == wanted


def test_every_title_and_every_alias_names_its_row() -> None:
    for key, row in names.SAMPLERS.items():
        for name in (key, row.title, row.title.upper(), *row.aliases):
            assert names.parse(name) == (key, None)
            assert names.parse(f"{name} karras") == (key, "karras")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no sampler is called 'dpmpp_2n_karras'; did you mean .*dpmpp_2m_karras"):
        names.parse("dpmpp_2n_karras")
    with pytest.raises(InputError, match="there are euler, euler_a"):
        names.parse("%%%")
    for name in (None, 3, ["euler"]):
        with pytest.raises(ArgumentTypeError, match="named by a string"):
            names.parse(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", names.list_samplers())
def test_every_sampler_runs_with_every_schedule_it_can_follow(name: str) -> None:
    followed = 0
    for schedule in (None, *names.list_schedules()):
        try:
            scheduler = names.make(name if schedule is None else f"{name}_{schedule}", SD)
        except InputError:  # DPM++ 2S has no timestep_spacing
            continue
        plan = scheduler.schedule(4)
        run = plan.run(normal(1) * plan.init_noise_sigma, lambda: normal(2))
        while run.t is not None:
            run.send(normal(3), normal(3) if plan.needs_unconditional else None)
        assert run.latents.isfinite().all()
        followed += 1
    assert followed >= 3


def test_a_name_says_all_of_the_schedule_whatever_the_config_said_before() -> None:
    karras = names.make("dpmpp_2m_sde_karras", SD)
    assert karras.config.use_karras_sigmas is True
    plain = names.make("dpmpp_2m", karras.config)
    assert (plain.config.use_karras_sigmas, plain.config.algorithm_type) == (False, "dpmsolver++")
    ancestral = names.make("euler_a_karras", karras.config)
    assert ancestral.config.timestep_spacing == "karras"
    back = names.make("euler", ancestral.config)
    assert (back.config.timestep_spacing, back.config.use_karras_sigmas) == ("linspace", False)
    assert back.config.beta_schedule == "scaled_linear"


@pytest.mark.parametrize("name", names.list_samplers())
def test_a_name_means_the_same_sampler_after_any_other(name: str) -> None:
    plain = names.make(name, SD).config.to_dict()
    for other in names.list_samplers():
        earlier = names.make(f"{other}_karras" if "2s" not in other else other, SD)
        found = names.make(name, earlier.config).config.to_dict()
        assert {key: found[key] for key in plain} == plain, other


def test_the_models_own_spacing_is_kept() -> None:
    scheduler = names.make("euler_a", {**SD, "timestep_spacing": "trailing", "prediction_type": "v_prediction"})
    assert (scheduler.config.timestep_spacing, scheduler.config.prediction_type) == ("trailing", "v_prediction")


def test_the_list_of_names_needs_no_torch() -> None:
    code = "import sys, russet.schedulers.names as n; n.parse('DPM++ 2M Karras'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_scheduler_is_shown_by_the_title_of_its_row() -> None:
    for name, row in names.SAMPLERS.items():
        assert names.title(names.make(name, SD)) == row.title
    sampler = names.make("unipc", SD)
    assert names.title(type(sampler)(sampler.config, solver_type="bh2")) == "UniPC bh2"
    assert names.title(names.make("dpmpp_2m", {**SD, "use_karras_sigmas": True})) == "DPM++ 2M"


def test_the_page_lists_every_sampler_with_its_class_and_every_schedule() -> None:
    text = (Path(__file__).parents[2] / "docs/en/samplers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|`]+) \| `(\w+)`", text, re.MULTILINE)
    assert rows == [(name, row.title, row.scheduler) for name, row in names.SAMPLERS.items()]
    schedules = re.findall(r"^\| `(\w+)` \| (–|(?:`\w+`(?:, )?)+) \|", text, re.MULTILINE)
    assert sorted(name for name, _ in schedules) == sorted(names.list_schedules())
    for name, aliases in schedules:
        assert all(names.parse(f"euler_{alias}") == ("euler", name) for alias in re.findall(r"\w+", aliases.strip("–")))
