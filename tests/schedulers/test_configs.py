from __future__ import annotations

import inspect
import json
import logging
import math
import pickle
from typing import Any

import pytest

from russet.errors import ConfigError
from russet.schedulers import named
from russet.schedulers.scheduler import Scheduler

from .loops import SD

diffusers = pytest.importorskip("diffusers")
DIFFUSERS = [name for name in dir(named) if name.endswith("Scheduler") and hasattr(diffusers, name)]
OURS = [cls for cls in vars(named).values() if isinstance(cls, type) and hasattr(cls, "config_class")]
SD15 = {  # as the checkpoint has it: no prediction_type, no timestep_spacing
    **SD,
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def test_the_seventeen_classes_of_diffusers_are_there() -> None:
    assert len(DIFFUSERS) == 17


@pytest.mark.parametrize("name", DIFFUSERS)
def test_keys_and_defaults_are_those_of_diffusers(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    wanted = {key: p.default for key, p in parameters.items() if key != "self"}
    config = getattr(named, name)().config
    found = {key: config[key] for key in wanted if key in config}
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()} == wanted
    assert set(config.to_dict()) == set(wanted)


@pytest.mark.parametrize("cls", OURS)
def test_an_unknown_keyword_is_refused_with_the_known_ones(cls: type[Scheduler]) -> None:
    with pytest.raises(ConfigError, match=r"has no karras_sigmas; it has num_train_timesteps"):
        cls(karras_sigmas=True)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("DDIM", {"beta_schedule": "quadratic"}, "beta_schedule must be 'linear' or 'scaled_linear'"),
    ("DDIM", {"num_train_timesteps": 0}, r"num_train_timesteps must be 1\.\.100000, not 0"),
    ("DDIM", {"num_train_timesteps": 10**9}, r"num_train_timesteps must be 1\.\.100000, not 1000000000"),
    ("DDIM", {"steps_offset": -1}, "steps_offset must be 0 or more, not -1"),
    ("DDIM", {"num_train_timesteps": 10.0}, "num_train_timesteps must be int"),
    ("DDIM", {"num_train_timesteps": True}, "num_train_timesteps must be int"),
    ("DDIM", {"beta_start": -0.1}, "a beta must be above 0"),
    ("DDIM", {"beta_end": math.nan}, "beta_end must be float"),
    ("DDIM", {"trained_betas": [0.1, 0.2]}, "one value for each of the 1000"),
    ("DDIM", {"clip_sample": "yes"}, "clip_sample must be bool"),
    ("DDIM", {"steps_offset": -1}, "steps_offset"),
    ("DDIM", {"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio"),
    ("DDPM", {"variance_type": "learned"}, "variance_type must be"),
    ("EulerDiscrete", {"timestep_spacing": "trailling"}, "timestep_spacing must be 'linspace' or 'leading'"),
    ("EulerDiscrete", {"prediction_type": "flow_prediction"}, "prediction_type must be"),
    ("EulerDiscrete", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of"),
    ("EulerDiscrete", {"timestep_type": "continuous"}, "timestep_type must be 'discrete'"),
    ("EulerDiscrete", {"interpolation_type": "log_linear"}, "interpolation_type must be 'linear'"),
    ("DPMSolverMultistep", {"use_flow_sigmas": True}, "use_flow_sigmas must be False"),
    ("DPMSolverMultistep", {"solver_order": 4}, "solver_order must be 1 or 2 or 3, not 4"),
    ("DPMSolverMultistep", {"solver_order": True}, "solver_order must be 1 or 2 or 3, not True"),
    ("DPMSolverMultistep", {"solver_order": 2.0}, r"solver_order must be 1 or 2 or 3, not 2\.0"),
    ("DPMSolverMultistep", {"algorithm_type": "dpm"}, "algorithm_type must be"),
    ("DPMSolverMultistep", {"variance_type": "learned_range"}, "variance_type must be None"),
    ("DPMSolverMultistep", {"lambda_min_clipped": math.nan}, "lambda_min_clipped"),
    ("UniPCMultistep", {"solver_p": "euler"}, "solver_p must be"),
    ("LCM", {"original_inference_steps": 0}, "original_inference_steps"),
    ("EulerChurn", {"s_churn": -1.0}, "s_churn must be 0 or more"),
    ("Restart", {"restart_times": 4}, r"restart_times must be 0\.\.3, not 4"),
    ("Restart", {"restart_sigma_min": 3.0}, "restart_sigma_min must be"),
]


@pytest.mark.parametrize(("name", "config", "message"), BAD)
def test_a_config_that_cannot_be_used_is_refused(name: str, config: dict[str, Any], message: str) -> None:
    cls = getattr(named, name + "Scheduler")
    for make in (lambda: cls(**config), lambda: cls(config), lambda: cls.from_config(config)):
        with pytest.raises(ConfigError, match=message):
            make()


def test_something_else_than_a_config_is_refused() -> None:
    for config in (1000, "scaled_linear", [1]):
        with pytest.raises(ConfigError, match="must be a JSON object"):
            named.DDIMScheduler(config)  # type: ignore[arg-type]


def test_a_default_is_not_carried_to_another_class_as_in_diffusers() -> None:
    for target in DIFFUSERS:
        theirs = getattr(diffusers, target).from_config(diffusers.PNDMScheduler.from_config(SD15).config)
        ours = getattr(named, target).from_config(named.PNDMScheduler.from_config(SD15).config)
        wanted = {k: v for k, v in theirs.config.items() if k in ours.config.to_dict() and not k.startswith("_")}
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in ours.config.items() if k in wanted} == wanted
    assert (
        named.EulerDiscreteScheduler.from_config(named.PNDMScheduler(SD15).config).config.timestep_spacing == "linspace"
    )


def test_what_was_given_is_carried_and_changes_win() -> None:
    first = named.DDIMScheduler(**SD, timestep_spacing="trailing")
    second = named.DPMSolverMultistepScheduler.from_config(first.config, use_karras_sigmas=True)
    assert second.config.timestep_spacing == "trailing"
    assert second.config.beta_schedule == "scaled_linear"
    third = named.DPMSolverMultistepScheduler.from_config(second.config, use_karras_sigmas=False)
    assert third.config.use_karras_sigmas is False
    # a key of which the default was kept can be changed as well
    plain = named.DPMSolverMultistepScheduler()
    assert named.DPMSolverMultistepScheduler.from_config(plain.config, solver_order=3).config.solver_order == 3


@pytest.mark.parametrize("there", OURS)
@pytest.mark.parametrize("here", OURS)
def test_going_to_another_class_and_back_loses_nothing(here: type[Scheduler], there: type[Scheduler]) -> None:
    known = here().config.to_dict()
    other = {"solver_type": "heun", "algorithm_type": "sde-dpmsolver++"} if "euler_at_final" in known else {}
    given = {"num_train_timesteps": 900, "steps_offset": 1, "use_karras_sigmas": True, "solver_order": 3, **other}
    first = here({**given, "of_another_class": 1})
    back = here.from_config(there.from_config(first.config).config)
    assert {name: back.config[name] for name in known} == {name: first.config[name] for name in known}
    assert back.config["of_another_class"] == 1


def test_a_value_of_another_solver_is_read_as_the_default_and_kept() -> None:
    unipc = named.UniPCMultistepScheduler(solver_type="bh1")
    dpm = named.DPMSolverMultistepScheduler.from_config(unipc.config)
    assert dpm.config.solver_type == "midpoint"
    deis = named.DEISMultistepScheduler.from_config(dpm.config)
    assert (deis.config.solver_type, deis.config.algorithm_type) == ("logrho", "deis")
    assert named.UniPCMultistepScheduler.from_config(deis.config).config.solver_type == "bh1"
    assert "_foreign_values" not in deis.config.to_dict()


def test_a_change_wins_over_a_value_that_was_kept() -> None:
    kept = named.DPMSolverMultistepScheduler.from_config(named.UniPCMultistepScheduler(solver_type="bh1").config).config
    assert named.DPMSolverMultistepScheduler.from_config(kept, solver_type="heun").config.solver_type == "heun"
    assert named.UniPCMultistepScheduler.from_config(kept, solver_type="bh2").config.solver_type == "bh2"


def test_a_config_of_diffusers_itself_can_be_given() -> None:
    theirs = diffusers.PNDMScheduler.from_config(SD15)
    ours = named.DPMSolverMultistepScheduler.from_config(theirs.config)
    assert ours.config.beta_schedule == "scaled_linear"
    assert ours.config.timestep_spacing == "linspace"


@pytest.mark.parametrize("name", DIFFUSERS)
def test_what_is_saved_is_read_by_diffusers_without_a_word(name: str, caplog: pytest.LogCaptureFixture) -> None:
    saved = json.loads(json.dumps(getattr(named, name)().config.to_dict()))
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        theirs = getattr(diffusers, name).from_config(saved)
    assert not [record for record in caplog.records if "not expected" in record.message]
    assert all(theirs.config[key] == value for key, value in saved.items())


@pytest.mark.parametrize("cls", OURS)
def test_a_scheduler_can_be_pickled(cls: type[Scheduler]) -> None:
    scheduler = pickle.loads(pickle.dumps(cls()))
    assert scheduler.config.to_dict() == cls().config.to_dict()


def test_compatibles_are_the_classes_on_trained_noise() -> None:
    names = {cls.__name__ for cls in named.DDIMScheduler().compatibles}
    assert {"DDIMScheduler", "UniPCMultistepScheduler", "RestartScheduler"} <= names
    assert "IPNDMScheduler" not in names
    assert named.IPNDMScheduler().compatibles == [named.IPNDMScheduler]
