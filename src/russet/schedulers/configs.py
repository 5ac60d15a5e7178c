"""The schedulers' configs: Diffusers' keys with their types, usual defaults and ranges, in one table.

As in Diffusers' ``from_config``, a key that was missing from a config, and so has its class's default, is not carried
over to another class: that one has its own default. A value that only another class knows (``solver_type: bh2``) is
read as this class's default and kept, so that going there and back loses nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from typing_extensions import Self

from russet.config import Config, conforms, field_types

UNSET, FOREIGN = "_use_default_values", "_foreign_values"  # never saved; the first is Diffusers' name for it

EVEN = ("linspace", "leading", "trailing", "simple", "sgm_uniform")  # spacings of timesteps; Diffusers has the first 3
BY_SIGMA = ("karras", "exponential", "beta", "kl_optimal", "align_your_steps", "align_your_steps_xl")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")  # learned ones are not supported


class Key:
    """default: the usual one; a class may have another. least, most: the range, both included.

    kinds: the possible types, if not the default's; a class has the first that fits its own default.
    """

    def __init__(self, default: Any, *kinds: Any, least: float = -math.inf, most: float = math.inf):
        self.default, self.kinds, self.least, self.most = default, kinds, least, most

    def kind(self, default: Any) -> Any:
        return next((kind for kind in self.kinds if conforms(default, kind)), type(default))


KEYS: Mapping[str, Key] = {
    "num_train_timesteps": Key(1000, least=1, most=100_000),  # they are entries of several tables
    # the noise that the model was trained with, and what its output means
    "beta_start": Key(0.0001),
    "beta_end": Key(0.02),
    "beta_schedule": Key("linear", Literal["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "trained_betas": Key(None, tuple[float, ...] | None),
    "prediction_type": Key("epsilon", Literal["epsilon", "v_prediction", "sample"]),
    "rescale_betas_zero_snr": Key(False),  # the last timestep is pure noise (arXiv:2305.08891)
    # where the steps are (arXiv:2305.08891, table 2), or noise levels of their own
    "timestep_spacing": Key("linspace", Literal[EVEN + BY_SIGMA]),
    "steps_offset": Key(0, least=0),
    "use_karras_sigmas": Key(False),
    "use_exponential_sigmas": Key(False),
    "use_beta_sigmas": Key(False),
    "use_lu_lambdas": Key(False),
    "sigma_min": Key(None, float | None),
    "sigma_max": Key(None, float | None),
    "lambda_min_clipped": Key(-math.inf, Any),  # -Infinity is valid in JSON, and is no float of a config
    "final_sigmas_type": Key("zero", Literal["zero", "sigma_min"]),
    "set_alpha_to_one": Key(True),
    # limits of the predicted image; dynamic thresholding is arXiv:2205.11487, section 2.3
    "clip_sample": Key(False),
    "clip_sample_range": Key(1.0),
    "thresholding": Key(False),
    "dynamic_thresholding_ratio": Key(0.995, least=0, most=1),
    "sample_max_value": Key(1.0),
    # of single solvers
    "variance_type": Key(None, Literal[None], Literal[VARIANCES]),
    "skip_prk_steps": Key(False),
    "solver_order": Key(2, Literal[1, 2, 3]),
    "algorithm_type": Key(
        "dpmsolver++", Literal["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"], Literal["deis"]
    ),
    "solver_type": Key("midpoint", Literal["midpoint", "heun"], Literal["bh1", "bh2"], Literal["logrho"]),
    "lower_order_final": Key(True),
    "euler_at_final": Key(False),
    "predict_x0": Key(True),
    "disable_corrector": Key((), tuple[int, ...]),
    "noise_sampler_seed": Key(None, int | tuple[int, ...] | None),
    "original_inference_steps": Key(50, least=1),  # of the distillation (arXiv:2310.04378)
    "timestep_scaling": Key(10.0),
    "s_churn": Key(10.0, least=0),  # by how much the noise is raised, and where (arXiv:2206.00364, table 5)
    "s_tmin": Key(0.0),
    "s_tmax": Key(None, float | None),
    "restart_times": Key(
        1, least=0, most=3
    ),  # how often the noise is raised again, and from where to where (arXiv:2306.14878)
    "restart_sigma_min": Key(0.1),
    "restart_sigma_max": Key(2.0),
    # flow matching and continuous time, which are not supported
    "interpolation_type": Key("linear", Literal["linear"]),
    "timestep_type": Key("discrete", Literal["discrete"]),
    "use_flow_sigmas": Key(False, Literal[False]),
    "flow_shift": Key(1.0),
    "use_dynamic_shifting": Key(False, Literal[False]),
    "time_shift_type": Key("exponential"),
    "shift_terminal": Key(None, Literal[None]),
    "solver_p": Key(None, Literal[None]),
}

# Keys that go together
TRAINED = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
SPACED = (*TRAINED, "timestep_spacing", "steps_offset")
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
RANGE = ("sigma_min", "sigma_max", "final_sigmas_type")
CLIPPING = ("clip_sample", "clip_sample_range")
THRESHOLDING = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
ZERO_SNR = ("rescale_betas_zero_snr",)
FLOW = ("use_flow_sigmas", "flow_shift", "use_dynamic_shifting", "time_shift_type")
HIGH_ORDER = (*TRAINED, *SIGMAS, *THRESHOLDING, "solver_order", "solver_type", "lower_order_final", *FLOW)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Config):
    """The base of all schedulers' configs: checks, and how a config is carried over to another class."""

    num_train_timesteps: int = KEYS["num_train_timesteps"].default

    def key(self, name: str) -> Any:
        """A value; the usual default for a key that the class does not have, whatever was kept from another class."""
        return getattr(self, name) if name in field_types(type(self)) else KEYS[name].default

    def check(self) -> None:
        fields, steps = field_types(type(self)), self.num_train_timesteps
        for name in fields:
            least, most = KEYS[name].least, KEYS[name].most
            if least > -math.inf:
                upper = f"..{most}" if most < math.inf else " or more"
                self.require(least <= self[name] <= most, f"{name} must be {least}{upper}, not {self[name]}")
        betas, lowest = self.key("trained_betas"), self.key("lambda_min_clipped")
        used = betas or (self.key("beta_start"), self.key("beta_end"))
        self.require(all(0 < beta <= 1 for beta in used), "a beta must be above 0, and 1 at most")
        fits = betas is None or len(betas) == steps
        self.require(fits, f"trained_betas must have one value for each of the {steps} num_train_timesteps")
        self.require(sum(map(self.key, SIGMAS)) <= 1, f"only one of {', '.join(SIGMAS)} can be set")
        number = lowest == -math.inf or conforms(lowest, float)
        self.require(number, f"lambda_min_clipped must be a number below infinity, not {lowest!r}")
        within = "original_inference_steps" not in fields or self.key("original_inference_steps") <= steps
        self.require(within, f"original_inference_steps must be {steps}, the num_train_timesteps, or less")
        rising = 0 < self.key("restart_sigma_min") < self.key("restart_sigma_max")
        self.require(rising, "restart_sigma_min must be above 0 and below restart_sigma_max")

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, changes: Mapping[str, Any]) -> Self:
        super().of(None, changes)  # refuses names that the class does not have
        return cls.merged(config or {}, changes)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "") -> Self:
        return cls.merged(data, {}, where)

    @classmethod
    def merged(cls, config: Mapping[str, Any], changes: Mapping[str, Any], where: str = "") -> Self:
        """A config with ``changes``, which take precedence over values that were kept for this class."""
        if isinstance(config, Mapping):  # the base class refuses anything else
            kept, unset, kinds = config.get(FOREIGN, {}), config.get(UNSET, ()), field_types(cls)
            config = {**{name: value for name, value in config.items() if name not in unset}, **kept, **changes}
            odd = [name for name in config.keys() & kinds.keys() if not conforms(config[name], kinds[name])]
            foreign = [name for name in odd if any(conforms(config[name], kind) for kind in KEYS[name].kinds)]
            config[FOREIGN] = {name: config.pop(name) for name in foreign}
            config[UNSET] = [name for name in kinds if name not in config]
        return super().from_dict(config, where)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in (UNSET, FOREIGN)}


def config_class(owner: type, keys: Sequence[str], defaults: Mapping[str, Any]) -> type[SchedulerConfig]:
    """The config class of a scheduler, named after it in errors and pickles. defaults: those of its own."""
    own = {**{name: KEYS[name].default for name in keys}, **defaults}
    fields = [(name, KEYS[name].kind(value), dataclasses.field(default=value)) for name, value in own.items()]
    how: Any = {"bases": (SchedulerConfig,), "frozen": True, "kw_only": True}
    made: type[SchedulerConfig] = dataclasses.make_dataclass(owner.__name__, fields, **how)
    made.__module__, made.__qualname__ = owner.__module__, f"{owner.__name__}.config_class"
    return made
