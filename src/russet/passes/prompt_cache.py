"""Prompt K/V cache: what every layer computes of the text, once a prompt instead of in every step.

That is keys and values, or with "folded" both multiplied into the weights around them, three operations a call.
Queries are a product of the tokens x, scores one of queries and keys, and all that is left of both is x times the
keys carried back through the queries' weights. In the same way the values are carried on through the output's weights.
With one column for each head and word,

    scores = x A        A = scale · W_q,h K_hᵀ   for each head h     [C, H·M]
    x + softmax(scores) B        B = V_h W_o,h + b_o / H             [H·M, C]

The output's bias is spread over the heads, whose weights add up to one each. It is less arithmetic where a layer has
more channels than twice the words, and more memory: A and B are as large as all heads' words times all channels.

Letters: R rows of text, M words, N tokens, H heads, D features of a head, C = H·D channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from russet.backends.blocks.inputs import Context, FoldedAttention
from russet.backends.blocks.transformer import OptimizedAttention
from russet.backends.blocks.unet import OptimizedUNet
from russet.hardware.facts import gigabytes
from russet.hardware.known_bugs import affected
from russet.models.attention import is_fused, padded_heads
from russet.models.transformer import Attention
from russet.passes.base import (
    LAYER_BY_LAYER,
    OPTIMIZED_UNET,
    Changes,
    Choices,
    Footprint,
    Pass,
    Situation,
    changeable,
)
from russet.passes.blocks import optimize_blocks
from russet.passes.packed_projections import PackedLinears, alike

PACKED, FOLDED = "packed keys and values", "folded into weights"

LONGEST = 77
"""Tokens of a text up to which it is folded: what more would take no plan knows."""

MOST_FOLDED = 2**26
"""Bytes that folded texts may take: as much again as a UNet call of one 512×512 picture needs, at the most."""


class Folded(FoldedAttention):
    """A text in one layer's weights. keys: Aᵀ [R, H·M, C]. values: B [R, H·M, C]."""

    def __init__(self, layer: Attention, keys: Tensor, values: Tensor) -> None:
        """From keys and values [R, H, M, D]. Computed in float32, and rounded once."""
        self.heads, out = layer.heads, layer.to_out[0]
        assert isinstance(out, nn.Linear)
        dim = keys.shape[3]
        inward = layer.to_q.weight.float().view(self.heads, dim, -1)
        outward = out.weight.float().view(-1, self.heads, dim).permute(1, 2, 0).contiguous()
        a = (keys.float() * layer.scale) @ inward
        b = values.float() @ outward
        if out.bias is not None:
            b = b + out.bias.float() / self.heads
        self.keys, self.values = a.flatten(1, 2).to(keys.dtype), b.flatten(1, 2).to(keys.dtype)

    def added(self, x: Tensor, normed: Tensor) -> Tensor:
        rows, tokens, _ = normed.shape
        keys = self.keys.view(rows, -1, self.keys.shape[2])
        scores = torch.bmm(normed, keys.transpose(1, 2)).view(rows, tokens, len(x) // rows, self.heads, -1)
        weights = scores.softmax(-1).flatten(3).transpose(1, 2).flatten(0, 1)
        return torch.baddbmm(x, weights, self.values)


class PromptCache(Context):
    """A text [R, M, Dc] with the keys and values of every layer that attends to it, or with what it is folded to.

    Layers that attend otherwise than by torch's own kernel need the scores apart: for them it is not folded.
    """

    def __init__(
        self,
        context: Tensor,
        layers: Sequence[OptimizedAttention] = (),
        fold: bool = False,
        packed: PackedLinears | None = None,
    ) -> None:
        """packed: the layers' ``to_k`` and ``to_v`` in turn, as one product; all of it is kept while any part is."""
        super().__init__(context)
        self._layers = layers
        self._product = None if packed is None else packed.product(context)
        self._keys_values: dict[Attention, tuple[Tensor, Tensor]] = {}
        self._folded: dict[Attention, Folded] = {}
        for layer, keys, values in self._projected():
            if fold and is_fused(layer.attention) and folds(layer):
                self._folded[layer] = Folded(layer, layer.split_heads(keys), layer.split_heads(values))
            else:
                self._keys_values[layer] = as_heads(layer, keys, values)

    def _projected(self) -> Iterator[tuple[OptimizedAttention, Tensor, Tensor]]:
        """Each layer with its keys and values of the text, [R, M, C] each."""
        start = 0
        for layer in self._layers:
            if self._product is None:
                yield layer, layer.to_k(self.tensor), layer.to_v(self.tensor)
                continue
            keys = self._product[..., start : (middle := start + layer.to_k.out_features)]
            values = self._product[..., middle : (start := middle + layer.to_v.out_features)]
            yield layer, keys, values

    def keys_values(self, layer: Attention) -> tuple[Tensor, Tensor]:
        return self._keys_values[layer] if layer in self._keys_values else super().keys_values(layer)

    def folded(self, layer: Attention) -> Folded | None:
        return self._folded.get(layer)

    def tensors(self) -> list[Tensor]:
        """The text and all keys and values."""
        if self._product is not None:
            return [self.tensor, self._product]
        return [self.tensor, *(tensor for pair in self._keys_values.values() for tensor in pair)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> PromptCache:
        """The same for other tensors, in the order of ``tensors()``."""
        cache = PromptCache(tensors[0])
        if self._product is not None:
            cache._layers, cache._product = self._layers, tensors[1]
            cache._keys_values = {layer: as_heads(layer, keys, values) for layer, keys, values in cache._projected()}
            return cache
        pairs = zip(tensors[1::2], tensors[2::2], strict=True)
        cache._keys_values = dict(zip(self._keys_values, pairs, strict=True))
        return cache


def folds(layer: OptimizedAttention) -> bool:
    """Whether a text fits into the weights around it: queries have no bias, and an output's bias is spread."""
    return layer.to_q.bias is None and isinstance(layer.to_out[0], nn.Linear)


def as_heads(layer: Attention, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [R, M, C] as heads [R, H, M, D], padded if the layer's attention pads them."""
    k, v = (padded_heads(layer.attention, layer.split_heads(x)) for x in (keys, values))
    return k, v


def text_layers(unet: nn.Module) -> list[OptimizedAttention]:
    """The layers that attend to the text, those that somebody has changed left out."""
    return [m for m in changeable(unet) if isinstance(m, OptimizedAttention) and m.is_cross_attention]


def cached_prompt(unet: nn.Module, context: Tensor, value: str) -> Context | Tensor:
    """A text for many calls of one prompt, as the plan's ``value`` has it."""
    if value == "off" or not isinstance(unet, OptimizedUNet):
        return context
    layers = text_layers(unet)
    packed = getattr(unet, "packed_texts", None) if value == PACKED else None
    return PromptCache(context, layers, value == FOLDED and context.shape[1] <= LONGEST, packed)


def decide(situation: Situation) -> tuple[str, str]:
    facts, decided, request = situation.facts, situation.decided, situation.request
    size, folded = cached_bytes(situation), folded_bytes(situation)
    if decided["offload"] == "sequential":
        return "off", LAYER_BY_LAYER
    if size > facts.budget // 50:
        return "off", f"the keys and values of all prompts would take {gigabytes(size)}, which is too much"
    kept = f"the prompt is the same in all steps; its keys and values take {gigabytes(size)}"
    if facts.device == "cuda":
        return PACKED, kept
    if facts.device != "mps" or affected(facts, "no-sdpa") or affected(facts, "no-flash"):
        return "keys and values", kept
    if situation.workload.unet.upcast_attention:
        return "keys and values", f"{kept}; this network needs float32 scores, which folded weights would not give"
    if request.attention_slicing not in (None, "off"):
        return "keys and values", f"{kept}; attention slicing was requested"
    if decided.width("unet") > 2 or folded > min(MOST_FOLDED, facts.budget // 40):
        return "keys and values", f"{kept}; folded into the weights they would take {gigabytes(folded)}, too much"
    return FOLDED, f"the prompt is the same in all steps; folded into the weights it takes {gigabytes(folded)}"


def apply(network: nn.Module, name: str, choices: Choices, changes: Changes) -> None:
    if name != "unet":
        return
    optimize_blocks(network, changes)
    projections = [one for layer in text_layers(network) for one in (layer.to_k, layer.to_v)]
    if choices["prompt_cache"] == PACKED and alike(projections):
        changes.set(network, "packed_texts", PackedLinears(projections))


def cached_bytes(situation: Situation) -> int:
    """What the keys and values of all prompts take, in all layers."""
    workload = situation.workload
    stages = workload.unet.stages
    features = sum(stage.channels * (stage.depth or 0) * (1 + stage.only_cross) for stage in stages)
    return int(workload.images * workload.rows * LONGEST * 2 * features * situation.decided.width("unet"))


def folded_bytes(situation: Situation) -> int:
    """What the weights of all layers take with all prompts folded into them."""
    workload = situation.workload
    features = sum(stage.channels * stage.heads * (stage.depth or 0) for stage in workload.unet.stages)
    return int(workload.images * workload.rows * LONGEST * 2 * features * situation.decided.width("unet"))


def footprint(situation: Situation) -> Footprint:
    if situation.decided["prompt_cache"] == FOLDED:
        walk = {**OPTIMIZED_UNET.walk, "folded": True}
        return replace(OPTIMIZED_UNET, kept=folded_bytes(situation), walk=walk)
    return replace(OPTIMIZED_UNET, kept=cached_bytes(situation))


PASS = Pass(
    name="prompt_cache",
    meaning="what is computed once a prompt and kept for all steps: 'off'; 'keys and values' of every cross-attention"
    " layer; 'packed keys and values', computed by one matrix product for all layers; 'folded into weights': the keys"
    " and values are multiplied into the projections around them",
    off="off",
    devices=("cpu", "mps", "cuda"),
    elsewhere="",
    decide=decide,
    apply=apply,
    footprint=footprint,
)
