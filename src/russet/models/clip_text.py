"""CLIP's text encoder: from token ids to what the UNet attends to (arXiv:2103.00020, section 2.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from russet.errors import InputError
from russet.models.base import Model, require_tensor
from russet.models.clip import CLIPEncoder, CLIPTowerConfig


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(CLIPTowerConfig):
    """The JSON keys of ``CLIPTextModel``.

    ``eos_token_id`` says where a prompt is pooled: at its first such token; 2, which no tokenizer of Stable Diffusion
    gives, stands in older checkpoints and means the token with the highest id.

    Raises:
        ConfigError: a value that cannot be built.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407

    def check(self) -> None:
        super().check()
        self.require_positive("vocab_size")
        self.require_positive("max_position_embeddings")


class CLIPTextOutput(NamedTuple):
    """What the text encoder says of ids [B, N].

    Attributes:
        last_hidden_state: [B, N, D], normalised: the conditioning of Stable Diffusion 1 and 2.
        pooler_output: [B, D], the same at the end of each prompt.
        hidden_states: if asked for, the embedded tokens and each layer's output [B, N, D], not normalised.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None


class CLIPTextProjectionOutput(NamedTuple):
    """What the text encoder with a projection says of ids [B, N].

    Attributes:
        text_embeds: [B, P], the projected end of each prompt: the pooled conditioning of XL.
        last_hidden_state: [B, N, D], normalised.
        hidden_states: if asked for, the embedded tokens and each layer's output [B, N, D], not normalised.
    """

    text_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None


class TextEmbeddings(nn.Module):
    """Tokens and their positions as vectors."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        # Called, though it is but a slice of its weight: offloading moves a layer's weights when the layer is called.
        places = self.position_embedding(torch.arange(ids.shape[1], device=ids.device))
        return self.token_embedding(ids) + places  # type: ignore[no-any-return]


class TextTransformer(nn.Module):
    """The tower: embeddings, layers that see the past only, a norm, and the pooled end of the prompt."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor, keep_states: bool) -> CLIPTextOutput:
        self._check(ids)
        x = self.embeddings(ids)
        states = self.encoder(x, causal_mask(ids.shape[1], x))
        last = self.final_layer_norm(states[-1])
        rows = torch.arange(ids.shape[0], device=last.device)
        return CLIPTextOutput(last, last[rows, self._ends(ids)], states if keep_states else None)

    def _check(self, ids: Tensor) -> None:
        require_tensor("input_ids", ids)
        most = self.config.max_position_embeddings
        if ids.ndim != 2 or ids.is_floating_point() or not 1 <= ids.shape[1] <= most:
            came = f"{ids.dtype} {list(ids.shape)}"
            raise InputError(f"input_ids must be whole numbers [B, N] with N from 1 to {most}, not {came}")

    def _ends(self, ids: Tensor) -> Tensor:
        """Where each prompt ends [B]."""
        ids = ids.to(torch.int32)  # mps cannot reduce int64 in older versions
        end = self.config.eos_token_id
        return (ids if end == 2 else (ids == end).to(torch.int32)).argmax(dim=-1)


def causal_mask(n: int, like: Tensor) -> Tensor:
    """What hides the future when added to scores: [N, N], 0 up to the diagonal and the lowest number beyond."""
    place = torch.arange(n, device=like.device)
    return like.new_zeros(n, n).masked_fill_(place > place[:, None], torch.finfo(like.dtype).min)


class CLIPTextModel(Model):
    """The text encoder of Stable Diffusion 1 and 2, and the first one of XL.

    Args:
        config: the config, as an object or a dict; ``changes`` are single values that win over it.

    Raises:
        ConfigError: the config cannot be built.
    """

    config_class: ClassVar[type[CLIPTextConfig]] = CLIPTextConfig
    config: CLIPTextConfig

    def __init__(self, config: Mapping[str, Any] | None = None, **changes: Any) -> None:
        super().__init__(CLIPTextConfig.of(config, changes))
        self.text_model = TextTransformer(self.config)
        self.eval()

    def forward(self, input_ids: Tensor, *, output_hidden_states: bool = False) -> CLIPTextOutput:
        """Encodes token ids [B, N].

        Raises:
            InputError: ``input_ids`` is not [B, N], not whole numbers, or longer than the positions.
        """
        return self.text_model(input_ids, output_hidden_states)  # type: ignore[no-any-return]


class CLIPTextModelWithProjection(Model):
    """The second text encoder of XL: as ``CLIPTextModel``, with a projection of the pooled text.

    Args:
        config: the config, as an object or a dict; ``changes`` are single values that win over it.

    Raises:
        ConfigError: the config cannot be built.
    """

    config_class: ClassVar[type[CLIPTextConfig]] = CLIPTextConfig
    config: CLIPTextConfig

    def __init__(self, config: Mapping[str, Any] | None = None, **changes: Any) -> None:
        super().__init__(CLIPTextConfig.of(config, changes))
        self.text_model = TextTransformer(self.config)
        self.text_projection = nn.Linear(self.config.hidden_size, self.config.projection_dim, bias=False)
        self.eval()

    def forward(self, input_ids: Tensor, *, output_hidden_states: bool = False) -> CLIPTextProjectionOutput:
        """Encodes token ids [B, N].

        Raises:
            InputError: ``input_ids`` is not [B, N], not whole numbers, or longer than the positions.
        """
        text = self.text_model(input_ids, output_hidden_states)
        embeds = self.text_projection(text.pooler_output)
        return CLIPTextProjectionOutput(embeds, text.last_hidden_state, text.hidden_states)
