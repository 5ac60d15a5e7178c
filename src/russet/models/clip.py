"""The transformer tower that CLIP's text and vision models share (arXiv:2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from russet.config import Config
from russet.models.activations import ACTIVATIONS
from russet.models.base import Attending


@dataclass(frozen=True, kw_only=True)
class CLIPTowerConfig(Config):
    """The JSON keys of every CLIP tower. ``projection_dim`` matters to the classes with a projection only.

    Raises:
        ConfigError: a value that cannot be built.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    projection_dim: int = 512
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def check(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim"):
            self.require_positive(name)
        self.require(self.layer_norm_eps > 0, f"layer_norm_eps must be positive, not {self.layer_norm_eps}")
        even = self.hidden_size % self.num_attention_heads == 0
        self.require(even, f"hidden_size {self.hidden_size} cannot be shared by {self.num_attention_heads} heads")
        known = ", ".join(ACTIVATIONS)
        self.require(self.hidden_act in ACTIVATIONS, f"hidden_act {self.hidden_act!r} is not supported; {known} are")

    def require_positive(self, name: str) -> None:
        self.require(self[name] > 0, f"{name} must be positive, not {self[name]}")


class CLIPAttention(Attending):
    """Self-attention of tokens [B, N, D]."""

    def __init__(self, config: CLIPTowerConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.heads = config.num_attention_heads
        self.scale = (dim // self.heads) ** -0.5
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        projections = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projections)
        out = self.attention(q, k, v, self.scale, mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class CLIPMLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, config: CLIPTowerConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class CLIPLayer(nn.Module):
    """Attention and a feed-forward network, each normalised first and added to its input."""

    def __init__(self, config: CLIPTowerConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))  # type: ignore[no-any-return]


class CLIPEncoder(nn.Module):
    """The layers of a tower."""

    def __init__(self, config: CLIPTowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """From embedded tokens [B, N, D] to those and every layer's output, in order."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return tuple(states)
