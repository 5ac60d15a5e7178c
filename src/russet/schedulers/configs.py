"""The schedulers' configs: Diffusers' keys, with each class's own defaults.

A key that a config did not have, and so has its class's default, is not carried over to another class, which has a
default of its own: so does Diffusers' ``from_config``. A value that only another class knows (``solver_type: bh2``) is
read as this class's default and kept, so that going there and back loses nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Self

from russet.config import Config, field_types

Narrowed = Mapping[str, tuple[Any, ...]]
UNSET, FOREIGN = "_use_default_values", "_foreign_values"  # never saved; the first is Diffusers' name for it

EVEN = ("linspace", "leading", "trailing", "simple", "sgm_uniform")  # spacings of timesteps
BY_SIGMA = ("karras", "exponential", "beta", "kl_optimal", "align_your_steps", "align_your_steps_xl")

# What a key can say, in whichever class has it. Flow matching, continuous time and learned variances are not supported.
CHOICES: Mapping[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": (*EVEN, *BY_SIGMA),  # Diffusers has the first three
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "solver_order": (1, 2, 3),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "solver_p": (None,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Config):
    """What every scheduler's config has, and how it is carried from one class to another."""

    num_train_timesteps: int = 1000

    narrowed: ClassVar[Narrowed] = {}  # the part of CHOICES that the class itself knows

    def check(self) -> None:
        self.require(self.num_train_timesteps >= 1, f"num_train_timesteps is {self.num_train_timesteps}, not 1 or more")
        for name, choices in {**CHOICES, **self.narrowed}.items():
            if name in field_types(type(self)):
                value, wanted = self[name], " or ".join(map(repr, choices))
                self.require(value in choices, f"{name} must be {wanted}, not {value!r}")

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, changes: Mapping[str, Any]) -> Self:
        super().of(None, changes)  # names that the class does not have
        return cls.merged(config or {}, changes)

    @classmethod
    def merged(cls, config: Mapping[str, Any], changes: Mapping[str, Any], where: str = "") -> Self:
        """A config with changes made to it; a key that is changed has been given."""
        if not isinstance(config, Mapping):
            return cls.from_dict(config, where)  # which refuses it
        unset = [name for name in config.get(UNSET, ()) if name not in changes]
        return cls.from_dict({**config, **changes, UNSET: unset}, where)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "") -> Self:
        if isinstance(data, Mapping):
            unset = set(data.get(UNSET, ()))
            data = {**{name: v for name, v in data.items() if name not in unset}, **data.get(FOREIGN, {})}
            odd = [k for k, own in cls.narrowed.items() if data.get(k) in CHOICES[k] and data.get(k) not in own]
            data[FOREIGN] = {name: data.pop(name) for name in odd}
            data[UNSET] = [name for name in field_types(cls) if name not in data]
        return super().from_dict(data, where)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in (UNSET, FOREIGN)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(SchedulerConfig):
    """The noise that the model was trained with, and what its output means."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"

    def check(self) -> None:
        super().check()
        betas, steps = self.trained_betas, self.num_train_timesteps
        self.require(all(0 < b <= 1 for b in betas or (self.beta_start, self.beta_end)), "a beta must lie in 0..1")
        fits = betas is None or len(betas) == steps
        self.require(fits, f"trained_betas must have one value for each of the {steps} num_train_timesteps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spaced(Trained):
    """Where the timesteps of a run are (arXiv:2305.08891, table 2)."""

    timestep_spacing: str = "linspace"
    steps_offset: int = 0

    def check(self) -> None:
        super().check()
        self.require(self.steps_offset >= 0, f"steps_offset must not be negative, not {self.steps_offset}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmaChoice(Trained):
    """Noise levels of their own, in place of those of evenly spaced timesteps."""

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
class SigmaRange(Trained):
    """The ends of those noise levels, and of the run."""

    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clipping(Trained):
    """Clipping of the predicted image."""

    clip_sample: bool = True
    clip_sample_range: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholding(Trained):
    """Dynamic thresholding of the predicted image (arXiv:2205.11487, section 2.3)."""

    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def check(self) -> None:
        super().check()
        ratio = self.dynamic_thresholding_ratio
        self.require(0 <= ratio <= 1, f"dynamic_thresholding_ratio must lie in 0..1, not {ratio}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroSNR(Trained):
    """Betas changed so that the last timestep is pure noise (arXiv:2305.08891)."""

    rescale_betas_zero_snr: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distilled(Trained):
    """The noise of Stable Diffusion, and the steps that the model was distilled for (arXiv:2310.04378)."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    def check(self) -> None:
        super().check()
        steps, most = self.original_inference_steps, self.num_train_timesteps
        self.require(1 <= steps <= most, f"original_inference_steps must lie in 1..{most}, not {steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Churn(Trained):
    """By how much the noise is raised in a run, and between which levels (arXiv:2206.00364, table 5)."""

    s_churn: float = 10.0
    s_tmin: float = 0.0
    s_tmax: float | None = None

    def check(self) -> None:
        super().check()
        self.require(self.s_churn >= 0, f"s_churn must not be negative, not {self.s_churn}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restart(Trained):
    """How often a run goes back up, and between which noise levels (arXiv:2306.14878)."""

    restart_times: int = 1
    restart_sigma_min: float = 0.1
    restart_sigma_max: float = 2.0

    def check(self) -> None:
        super().check()
        self.require(0 <= self.restart_times <= 3, f"restart_times must lie in 0..3, not {self.restart_times}")
        rising = 0 < self.restart_sigma_min < self.restart_sigma_max
        self.require(rising, "restart_sigma_min must be above 0 and below restart_sigma_max")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HighOrder(SigmaChoice, Thresholding):
    """What the solvers of DPM-Solver's kind have in common."""

    solver_order: int = 2
    lower_order_final: bool = True
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolver(HighOrder):
    """DPM-Solver's own keys."""

    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    final_sigmas_type: str = "zero"
    lambda_min_clipped: Any = -math.inf  # which JSON has, and a float of a config does not
    variance_type: str | None = None

    narrowed: ClassVar[Narrowed] = {
        "algorithm_type": CHOICES["algorithm_type"][:4],
        "solver_type": ("midpoint", "heun"),
        "variance_type": (None,),
    }

    def check(self) -> None:
        super().check()
        least = self.lambda_min_clipped
        number = isinstance(least, (int, float)) and not isinstance(least, bool) and least < math.inf
        self.require(number, f"lambda_min_clipped must be a number below infinity, not {least!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DEIS(HighOrder):
    """DEIS knows one form of itself; the keys are there for the sake of the other solvers' configs."""

    algorithm_type: str = "deis"
    solver_type: str = "logrho"

    narrowed: ClassVar[Narrowed] = {"algorithm_type": ("deis",), "solver_type": ("logrho",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniPC(HighOrder):
    """UniPC's own keys."""

    predict_x0: bool = True
    solver_type: str = "bh2"
    disable_corrector: tuple[int, ...] = ()
    solver_p: None = None
    shift_terminal: None = None

    narrowed: ClassVar[Narrowed] = {"solver_type": ("bh1", "bh2")}


def keys(*parts: type[SchedulerConfig], **own: Any) -> type[SchedulerConfig]:
    """A config class out of parts. own: its further keys with their defaults, or other defaults for those of the parts.

    A further key has the type of its default; ``(type, default)`` says another one.
    """
    known = {name: kind for part in parts for name, kind in field_types(part).items()}
    fields: list[tuple[str, Any, Any]] = []
    for name, value in own.items():
        kind, default = value if isinstance(value, tuple) else (known.get(name, type(value)), value)
        fields.append((name, kind, dataclasses.field(default=default)))
    return dataclasses.make_dataclass("SchedulerConfig", fields, bases=parts, frozen=True, kw_only=True)
