"""Tiny networks, what passes are switched on by, and a call of a network as the denoiser makes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from russet import passes
from russet.backends.blocks.unet import OptimizedUNet
from russet.models.attention import fused, padded
from russet.models.base import Model
from russet.models.clip_text import CLIPTextModel
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL
from russet.passes.base import Changes, Choices
from russet.passes.prompt_cache import cached_prompt
from russet.passes.timestep_embeddings import TimestepCache

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
SD1: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": (CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
UNETS: dict[str, dict[str, Any]] = {
    "SD 1": SD1,
    "SD 2": {**SD1, "transformer_layers_per_block": 2, "use_linear_projection": True, "upcast_attention": True},
    "XL": {
        **SD1,
        "down_block_types": (DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, UP),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 10 + 6 * 6,
    },
    "text on the second level": {**SD1, "down_block_types": (DOWN, CROSS_DOWN), "up_block_types": (CROSS_UP, UP)},
    "LCM": {**SD1, "time_cond_proj_dim": 5},
    "only cross-attention": {**SD1, "only_cross_attention": True},
    "scale and shift": {**SD1, "resnet_time_scale_shift": "scale_shift"},
    "no middle": {**SD1, "mid_block_type": None},
    "middle without attention": {**SD1, "mid_block_type": "UNetMidBlock2D"},
    "gelu, scaled and centred": {
        **SD1,
        "act_fn": "gelu",
        "mid_block_scale_factor": 1.5,
        "downsample_padding": 0,
        "center_input_sample": True,
    },
}
VAE: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
}
TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

FAMILIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "cpu": {
        "buffer_donation": (True,),
        "shared_prefix": (True,),
        "onednn_linear": (True,),
        "weight_prepacking": (True,),
        "winograd": (True,),
        "malloc_tuning": (True,),
        "prompt_cache": ("keys and values",),
    },
    "mps": {
        "buffer_donation": (True,),
        "shared_prefix": (True,),
        "packed_projections": (True,),
        "residual_fusion": ("with weight copies", "on"),
        "timestep_embeddings": ("precomputed",),
        "prompt_cache": ("folded into weights", "keys and values"),
        "group_norm": ("composed",),
        "layer_norm": ("float32",),
        "duplicate_single_rows": (True,),
        "flatten_linear_inputs": (True,),
        "float32_gelu": (True,),
    },
    "cuda": {
        "buffer_donation": (True,),
        "shared_prefix": (True,),
        "ops": ("triton",),
        "fused_geglu": (True,),
        "upsample_fusion": (True,),
        "packed_projections": (True,),
        "prompt_cache": ("packed keys and values",),
        "cuda_graphs": (True,),
    },
}
"""Device → pass or workaround → the values that switch it on, the one of all together first."""

NO_TRITON = {name: values for name, values in FAMILIES["cuda"].items() if name not in ("ops", "fused_geglu")}


@dataclass(frozen=True)
class Case:
    """A setting of passes. values: decision → value, where it is not off."""

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def choices(self, rows: int = 2) -> Choices:
        return Choices({**passes.OFF, "offload": None, **self.values}, rows)

    def apply(self, network: nn.Module, component: str = "unet", rows: int = 2) -> Changes:
        return passes.apply(network, component, self.choices(rows))


def alone(family: str) -> Iterator[Case]:
    for name, values in FAMILIES[family].items():
        for value in values:
            yield Case(f"{name}={value}", {name: value})


def together(family: str) -> Case:
    return Case(f"all of {family}", {name: values[0] for name, values in FAMILIES[family].items()})


ALONE = list({case.name: case for family in ("cpu", "mps") for case in alone(family)}.values())
ALONE += [Case("prompt_cache=packed keys and values", {"prompt_cache": "packed keys and values"})]
TOGETHER = [together("cpu"), together("mps")]
CASES = [*ALONE, *TOGETHER]
"""Those that need no Triton."""

EXACT = ("buffer_donation", "shared_prefix", "timestep_embeddings", "malloc_tuning", "cuda_graphs")
"""Passes that do not change a bit, prompt_cache with keys and values beside them."""


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(network: Model) -> Any:
    """The network with no weight at a neutral 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return network.requires_grad_(False)


def unet(name: str = "SD 1", **changes: Any) -> Any:
    torch.manual_seed(0)
    return shaken(UNet2DConditionModel({**UNETS[name], **changes}))


def vae(**changes: Any) -> Any:
    torch.manual_seed(0)
    return shaken(AutoencoderKL({**VAE, **changes}))


def text_encoder() -> Any:
    torch.manual_seed(0)
    return shaken(CLIPTextModel({**TEXT}))


PADDED = padded(fused, (6, 16))


@dataclass(frozen=True)
class Ask:
    """What a UNet is asked: latents of ``images``, each with as many texts as make ``rows``."""

    x: Tensor
    context: Tensor
    conditions: Mapping[str, Any]

    @staticmethod
    def of(network: Any, images: int = 1, texts: int = 2, size: tuple[int, int] = (8, 8)) -> Ask:
        config, rows = network.config, images * texts
        conditions: dict[str, Any] = {}
        if config.addition_embed_type:
            ids = torch.tensor([[1024.0, 768, 0, 16, 1024, 1024]]).repeat(rows, 1)
            conditions["added_cond_kwargs"] = {"text_embeds": seeded(rows, 10, seed=5), "time_ids": ids}
        if config.time_cond_proj_dim:
            conditions["timestep_cond"] = seeded(1, config.time_cond_proj_dim, seed=6).expand(rows, -1)
        return Ask(seeded(images, config.in_channels, *size, seed=1), seeded(rows, 7, 12, seed=2), conditions)

    def answer(self, network: Any, case: Case | None = None, t: float = 500.0) -> Tensor:
        """As the denoiser calls a network, plain or with passes applied."""
        rows, time, conditions = len(self.context), t, self.conditions
        if not isinstance(network, OptimizedUNet) or case is None:
            x = torch.cat([self.x] * (rows // len(self.x)))
            output: Tensor = network(x, t, self.context, **conditions).sample
            return output
        choices = case.choices(rows)
        text = cached_prompt(network, self.context, choices["prompt_cache"])
        if choices["timestep_embeddings"] == "precomputed" and "added_cond_kwargs" not in conditions:
            cond = conditions.get("timestep_cond")
            cache = TimestepCache(network, [t], None if cond is None else cond[:1])
            if (known := cache(t)) is not None:
                time, conditions = known, {}  # type: ignore[assignment]
        found: Tensor = network(self.x, time, text, **conditions).sample
        return found


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Requires results to agree within ``tolerance`` of the largest number."""
    assert found.shape == expected.shape
    assert found.isfinite().all()
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def state(network: nn.Module) -> dict[str, tuple[Any, ...]]:
    """All that a pass could leave behind: classes, attributes, and parameters as objects with their values."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, module in network.named_modules():
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        weights = {key: (id(value), value.clone()) for key, value in module._parameters.items() if value is not None}
        found[name] = type(module), own, weights
    return found


def require_same(network: nn.Module, before: Mapping[str, tuple[Any, ...]]) -> None:
    after = state(network)
    assert list(after) == list(before)
    for name, (cls, own, weights) in before.items():
        assert after[name][0] is cls, name
        assert after[name][1] == own, name
        assert list(after[name][2]) == list(weights), name
        for key, (identity, value) in weights.items():
            now, now_value = after[name][2][key]
            assert now == identity, (name, key)
            assert torch.equal(now_value, value), (name, key)
