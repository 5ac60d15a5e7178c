"""The schedulers' configs: Diffusers' keys, each class with Diffusers' own defaults.

A key that a config did not have, and so has this class's default, is not carried over to another class, which has a
default of its own: that is how Diffusers' ``from_config`` works. A value that only another class knows
(``solver_type: bh2``) is read as this class's default and kept, so that going there and back loses nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from typing_extensions import Self

from russet.config import Config, field_types

UNSET = "_use_default_values"  # Diffusers' name for the keys that were not given; never saved
FOREIGN = "_foreign_values"

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"]
Spacing = Literal[
    "linspace",
    "leading",
    "trailing",
    # Russet's own, for every class that has a timestep_spacing
    "simple",
    "sgm_uniform",
    "karras",
    "exponential",
    "beta",
    "kl_optimal",
    "align_your_steps",
    "align_your_steps_xl",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Config):
    """What every scheduler's config has, and how it is carried from one class to another."""

    num_train_timesteps: int = 1000

    foreign: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @property
    def ends_at_zero(self) -> bool:
        """Whether the last step goes to no noise at all; else to the noise of timestep 0."""
        return True

    def check(self) -> None:
        steps = self.num_train_timesteps
        self.require(steps >= 1, f"num_train_timesteps must be at least 1, not {steps}")
        for name in ("use_flow_sigmas", "use_dynamic_shifting", "shift_terminal", "solver_p", "variance_type"):
            value = getattr(self, name, None)
            known = value is None or value is False or str(value).startswith("fixed")
            self.require(known, f"{name}={value!r} is not supported: leave it out")

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, changes: Mapping[str, Any]) -> Self:
        super().of(None, changes)  # names that the class does not have
        return cls.merged(config or {}, changes)

    @classmethod
    def merged(cls, config: Mapping[str, Any], changes: Mapping[str, Any], where: str = "") -> Self:
        """A config with changes made to it; a key that is changed has been given."""
        unset = [name for name in config.get(UNSET, ()) if name not in changes]
        return cls.from_dict({**config, **changes, UNSET: unset}, where)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "") -> Self:
        if isinstance(data, Mapping):
            unset = set(data.get(UNSET, ()))
            data = {**{name: v for name, v in data.items() if name not in unset}, **data.get(FOREIGN, {})}
            foreign = {name: data.pop(name) for name, values in cls.foreign.items() if data.get(name) in values}
            data[FOREIGN], data[UNSET] = foreign, [name for name in field_types(cls) if name not in data]
        return super().from_dict(data, where)

    def to_dict(self) -> dict[str, Any]:
        private = (UNSET, FOREIGN)
        return {name: v for name, v in super().to_dict().items() if name not in private}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(SchedulerConfig):
    """The noise that the model was trained with, and what its output means."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"

    def check(self) -> None:
        super().check()
        betas, steps = self.trained_betas, self.num_train_timesteps
        inside = all(0 < beta <= 1 for beta in betas or (self.beta_start, self.beta_end))
        self.require(inside, "betas must lie in 0..1, and 0 is not one of them")
        if betas is not None:
            self.require(len(betas) == steps, f"trained_betas has {len(betas)} values for {steps} num_train_timesteps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spaced(Trained):
    timestep_spacing: Spacing = "linspace"
    steps_offset: int = 0

    def check(self) -> None:
        super().check()
        self.require(self.steps_offset >= 0, f"steps_offset must not be negative, not {self.steps_offset}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmaChoice(Trained):
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False

    def check(self) -> None:
        super().check()
        chosen = self.use_karras_sigmas + self.use_exponential_sigmas + self.use_beta_sigmas
        self.require(
            chosen <= 1, "only one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas can be set"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholding(Trained):
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def check(self) -> None:
        super().check()
        ratio = self.dynamic_thresholding_ratio
        self.require(0 <= ratio <= 1, f"dynamic_thresholding_ratio must lie in 0..1, not {ratio}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clipping(Trained):
    clip_sample: bool = True
    clip_sample_range: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroSNR(Trained):
    rescale_betas_zero_snr: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIMConfig(Spaced, Clipping, Thresholding, ZeroSNR):
    timestep_spacing: Spacing = "leading"
    set_alpha_to_one: bool = True

    @property
    def ends_at_zero(self) -> bool:
        return self.set_alpha_to_one


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPMConfig(Spaced, Clipping, Thresholding, ZeroSNR):
    timestep_spacing: Spacing = "leading"
    variance_type: str = "fixed_small"

    def check(self) -> None:
        super().check()
        known = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
        self.require(self.variance_type in known, f"variance_type must be one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PNDMConfig(Spaced):
    timestep_spacing: Spacing = "leading"
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False

    @property
    def ends_at_zero(self) -> bool:
        return self.set_alpha_to_one


@dataclasses.dataclass(frozen=True, kw_only=True)
class IPNDMConfig(SchedulerConfig):
    trained_betas: None = None

    prediction_type: ClassVar[str] = "v_prediction"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerAncestralConfig(Spaced, ZeroSNR):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMSConfig(Spaced, SigmaChoice):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerConfig(LMSConfig, ZeroSNR):
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    @property
    def ends_at_zero(self) -> bool:
        return self.final_sigmas_type == "zero"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDPM2Config(LMSConfig):
    beta_start: float = 0.00085
    beta_end: float = 0.012


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeunConfig(KDPM2Config):
    clip_sample: bool = False
    clip_sample_range: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDEConfig(KDPM2Config):
    noise_sampler_seed: int | tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HighOrder(SigmaChoice, Thresholding):
    """What the solvers of DPM-Solver's kind have in common."""

    solver_order: int = 2
    lower_order_final: bool = True
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    def check(self) -> None:
        super().check()
        self.require(self.solver_order in (1, 2, 3), f"solver_order must be 1, 2 or 3, not {self.solver_order}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinglestepConfig(HighOrder):
    algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: Any = -math.inf
    variance_type: str | None = None

    foreign: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "algorithm_type": ("deis",),
        "solver_type": ("logrho", "bh1", "bh2"),
    }

    @property
    def ends_at_zero(self) -> bool:
        return self.final_sigmas_type == "zero"

    def check(self) -> None:
        super().check()
        least = self.lambda_min_clipped
        number = isinstance(least, (int, float)) and not isinstance(least, bool) and least < math.inf
        self.require(number, f"lambda_min_clipped must be a number below infinity, not {least!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultistepConfig(Spaced, ZeroSNR, SinglestepConfig):
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_lu_lambdas: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DEISConfig(Spaced, HighOrder):
    algorithm_type: Literal["deis"] = "deis"
    solver_type: Literal["logrho"] = "logrho"

    foreign: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun", "bh1", "bh2"),
    }

    @property
    def ends_at_zero(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniPCConfig(Spaced, ZeroSNR, HighOrder):
    predict_x0: bool = True
    solver_type: Literal["bh1", "bh2"] = "bh2"
    disable_corrector: tuple[int, ...] = ()
    solver_p: None = None
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    sigma_min: float | None = None
    sigma_max: float | None = None
    shift_terminal: float | None = None

    foreign: ClassVar[Mapping[str, tuple[str, ...]]] = {"solver_type": ("midpoint", "heun", "logrho")}

    @property
    def ends_at_zero(self) -> bool:
        return self.final_sigmas_type == "zero"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LCMConfig(Spaced, Clipping, Thresholding, ZeroSNR):
    """timestep_spacing and steps_offset are Diffusers' keys without effect: the steps are those of the distillation."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    clip_sample: bool = False
    timestep_spacing: Spacing = "leading"
    set_alpha_to_one: bool = True
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    def check(self) -> None:
        super().check()
        steps, most = self.original_inference_steps, self.num_train_timesteps
        self.require(1 <= steps <= most, f"original_inference_steps must lie in 1..{most}, not {steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TCDConfig(LCMConfig):
    @property
    def ends_at_zero(self) -> bool:
        return False
