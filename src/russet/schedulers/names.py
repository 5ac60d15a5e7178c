"""Samplers by the names of k-diffusion and ComfyUI (``dpmpp_2m_karras``) and of A1111 ("DPM++ 2M Karras").

A name is a sampler, alone or with a sigma schedule or spacing behind it. This table imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from russet.errors import ArgumentTypeError, InputError

if TYPE_CHECKING:
    from russet.schedulers.scheduler import Scheduler


class Sampler(NamedTuple):
    """A row: the name that is shown, the scheduler's class, what its config says, and other names."""

    title: str
    scheduler: str
    config: Mapping[str, Any] = {}
    aliases: tuple[str, ...] = ()


def _dpm(order: int, algorithm: str = "dpmsolver++", solver: str = "midpoint") -> dict[str, Any]:
    return {"algorithm_type": algorithm, "solver_order": order, "solver_type": solver}


SAMPLERS: Mapping[str, Sampler] = {
    "euler": Sampler("Euler", "EulerDiscreteScheduler"),
    "euler_a": Sampler("Euler a", "EulerAncestralDiscreteScheduler", aliases=("euler_ancestral",)),
    "euler_churn": Sampler("Euler churn", "EulerChurnScheduler"),
    "heun": Sampler("Heun", "HeunDiscreteScheduler"),
    "dpm2": Sampler("DPM2", "KDPM2DiscreteScheduler", aliases=("dpm_2",)),
    "dpm2_a": Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler", aliases=("dpm2_ancestral", "dpm_2_ancestral")),
    "lms": Sampler("LMS", "LMSDiscreteScheduler"),
    "ddim": Sampler("DDIM", "DDIMScheduler"),
    "ddpm": Sampler("DDPM", "DDPMScheduler"),
    "pndm": Sampler("PNDM", "PNDMScheduler", {"skip_prk_steps": False}),
    "plms": Sampler("PLMS", "PNDMScheduler", {"skip_prk_steps": True}),
    "ipndm": Sampler("iPNDM", "IPNDMDiscreteScheduler"),
    "dpmpp_2s": Sampler("DPM++ 2S", "DPMSolverSinglestepScheduler", _dpm(2)),
    "dpmpp_2s_a": Sampler("DPM++ 2S a", "DPMSolverSinglestepAncestralScheduler", aliases=("dpmpp_2s_ancestral",)),
    "dpmpp_2m": Sampler("DPM++ 2M", "DPMSolverMultistepScheduler", _dpm(2)),
    "dpmpp_3m": Sampler("DPM++ 3M", "DPMSolverMultistepScheduler", _dpm(3)),
    "dpmpp_2m_sde": Sampler("DPM++ 2M SDE", "DPMSolverMultistepScheduler", _dpm(2, "sde-dpmsolver++")),
    "dpmpp_2m_sde_heun": Sampler(
        "DPM++ 2M SDE Heun", "DPMSolverMultistepScheduler", _dpm(2, "sde-dpmsolver++", "heun")
    ),
    "dpmpp_3m_sde": Sampler("DPM++ 3M SDE", "DPMSolverMultistepScheduler", _dpm(3, "sde-dpmsolver++")),
    "dpmpp_sde": Sampler("DPM++ SDE", "DPMSolverSDEScheduler"),
    "unipc": Sampler("UniPC", "UniPCMultistepScheduler", {"solver_type": "bh1", "solver_order": 2}, ("uni_pc",)),
    "unipc_bh2": Sampler(
        "UniPC bh2", "UniPCMultistepScheduler", {"solver_type": "bh2", "solver_order": 2}, ("uni_pc_bh2",)
    ),
    "deis": Sampler("DEIS", "DEISMultistepScheduler", {"solver_order": 2}),
    "lcm": Sampler("LCM", "LCMScheduler"),
    "tcd": Sampler("TCD", "TCDScheduler"),
    "restart": Sampler("Restart", "RestartScheduler"),
    "euler_cfgpp": Sampler("Euler CFG++", "EulerCFGPPScheduler", aliases=("euler_cfg_pp",)),
    "euler_a_cfgpp": Sampler("Euler a CFG++", "EulerAncestralCFGPPScheduler", aliases=("euler_ancestral_cfg_pp",)),
    "ddim_cfgpp": Sampler("DDIM CFG++", "DDIMCFGPPScheduler", aliases=("ddim_cfg_pp",)),
}

SCHEDULES: Mapping[str, tuple[str, ...]] = {
    "karras": (),
    "exponential": ("polyexponential",),  # the same at its usual rho of 1
    "beta": (),
    "simple": (),
    "sgm_uniform": (),
    "kl_optimal": (),
    "align_your_steps": ("ays", "align_your_steps_sd15"),
    "align_your_steps_xl": ("ays_xl", "align_your_steps_sdxl"),
    "linspace": ("normal", "uniform"),
    "leading": ("ddim_uniform",),
    "trailing": (),
}


def list_samplers() -> list[str]:
    """The short names of all samplers; each may be followed by one of ``list_schedules``."""
    return list(SAMPLERS)


def list_schedules() -> list[str]:
    return list(SCHEDULES)


def parse(name: str) -> tuple[str, str | None]:
    """(sampler, schedule or None) of a name, in any case and in A1111's or ComfyUI's spelling.

    Raises:
        InputError: no sampler has that name; the nearest ones are listed.
    """
    if not isinstance(name, str):
        raise ArgumentTypeError(f"a sampler is named by a string, not {name!r}")
    samplers = {alias: key for key, row in SAMPLERS.items() for alias in (key, *row.aliases)}
    schedules = {alias: key for key, aliases in SCHEDULES.items() for alias in (key, *aliases)}
    plain = re.sub(r"[\s_-]+", "_", name.strip().lower().replace("++", "pp"))
    if plain in samplers:
        return samplers[plain], None
    for alias in sorted(schedules, key=len, reverse=True):
        before = plain.removesuffix("_" + alias)
        if before != plain and before in samplers:
            return samplers[before], schedules[alias]
    known = [*samplers, *(f"{sampler}_{schedule}" for sampler in samplers for schedule in schedules)]
    near = difflib.get_close_matches(plain, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(SAMPLERS)}"
    raise InputError(f"no sampler is called {name!r}; {hint}")


def title(scheduler: Scheduler) -> str:
    """The name under which A1111 shows a scheduler's sampler; the class's own where no row of the table is it."""
    kind = type(scheduler).__name__
    for row in SAMPLERS.values():
        if row.scheduler == kind and all(scheduler.config.get(key) == value for key, value in row.config.items()):
            return row.title
    return kind.removesuffix("Scheduler")


def make(name: str, config: Mapping[str, Any] | None = None) -> Scheduler:
    """The scheduler of a name, for a model whose scheduler has this ``config`` (``pipe.scheduler.config``).

    Raises:
        InputError: an unknown name, or a schedule that the sampler cannot follow.
    """
    from russet.config import field_types
    from russet.schedulers import configs, named

    sampler, schedule = parse(name)
    row, config = SAMPLERS[sampler], dict(config or {})
    cls: type[Scheduler] = getattr(named, row.scheduler)
    has = field_types(cls.config_class)
    changes = {**row.config, **{key: False for key in has if re.fullmatch(r"use_\w+_sigmas|use_lu_lambdas", key)}}
    if config.get("timestep_spacing") not in configs.EVEN:  # one that an earlier name had set
        config.pop("timestep_spacing", None)
    if f"use_{schedule}_sigmas" in has:
        changes[f"use_{schedule}_sigmas"] = True
    elif schedule is not None and "timestep_spacing" not in has:
        raise InputError(f"{row.title} cannot follow the schedule {schedule}: its class has no timestep_spacing")
    elif schedule is not None:
        changes["timestep_spacing"] = schedule
    return cls.from_config(config, **changes)
