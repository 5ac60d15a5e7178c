"""The transformer's layers, with packed projections, cached or folded texts, and sums within products."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from russet.backends.blocks.inputs import Context, FoldedAttention
from russet.backends.ops import EAGER, Ops, flat_linear, repeated_rows, viewed_rows
from russet.models.attention import padded_heads
from russet.models.transformer import (
    GEGLU,
    Attention,
    BasicTransformerBlock,
    FeedForward,
    Transformer2DModel,
    to_map,
    to_tokens,
)


class PackedProjection(Protocol):
    """Linear layers of one input whose weights are parts of one tensor."""

    def product(self, x: Tensor) -> Tensor | None:
        """The outputs of all layers for ``x`` [..., Din] side by side; None where they are not packed any more."""
        ...


class ResidualAttention(Protocol):
    """Self-attention and the sum with its input, within its products."""

    def added(self, x: Tensor, normed: Tensor, layer: Attention) -> Tensor:
        """``x`` [B, N, C] plus the projected attention of ``normed`` [B, N, C]."""
        ...


class OptimizedAttention(Attention):
    """``Attention``; ``packed`` multiplies queries, keys and values at once."""

    packed: PackedProjection | None = None

    def forward(self, x: Tensor, context: Tensor | Context | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x, context.tensor if isinstance(context, Context) else context)
        if context is None:
            q, k, v = self.self_projections(x)
        else:
            q, (k, v) = self.split_heads(self.to_q(x)), Context.of(context).keys_values(self)
        out = self.attention(q, k, v, self.scale)[..., : self.to_v.out_features // self.heads]
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def self_projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, N, D] of the tokens themselves."""
        joined = None if self.packed is None else self.packed.product(x)
        if joined is None:
            q, k, v = (self.split_heads(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
            return q, k, v
        joined = joined.view(*joined.shape[:2], 3, self.heads, -1)
        q, k, v = padded_heads(self.attention, joined).transpose(1, 3).unbind(2)
        return q, k, v


class OptimizedGEGLU(GEGLU):
    """``GEGLU``."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return gated(self.proj(x))


def gated(x: Tensor) -> Tensor:
    """The first half of the features [..., 2D] times the GELU of the second."""
    value, gate = x.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


class OptimizedTransformerBlock(BasicTransformerBlock):
    """``BasicTransformerBlock``; each sum goes into the output of the linear layer before it."""

    ops: Ops = EAGER

    def forward(self, x: Tensor, context: Tensor | Context) -> Tensor:
        context = Context.of(context)
        if torch.is_grad_enabled():
            return super().forward(repeated_rows(x, context.rows), context.tensor)
        ops = self.ops
        if self.only_cross_attention:
            x = repeated_rows(x, context.rows)
        h = call(self.attn1, ops.layer_norm(x, self.norm1), context if self.only_cross_attention else None)
        x, normed = ops.add_layer_norm(h, x, self.norm2)
        if folded(self.attn2, context) is not None:
            x = self._cross_attention(x, normed, context)
            del h, normed  # before the block's widest moment
            return ops.add(self.ff(ops.layer_norm(x, self.norm3)), x)
        x, normed = repeated_rows(x, context.rows), repeated_rows(normed, context.rows)
        h = call(self.attn2, normed, context)
        if not isinstance(self.ff, OptimizedFeedForward):
            x, normed = ops.add_layer_norm(h, x, self.norm3)
            return ops.add(self.ff(normed), x)
        x, normed, bias_added = ops.add_layer_norm_before(h, x, self.norm3, self.ff.last)
        return ops.linear_add(self.ff.net[0](normed), self.ff.last, x, bias_added)

    def _cross_attention(self, x: Tensor, normed: Tensor, context: Context) -> Tensor:
        """``x`` plus the attention of ``normed`` to the text."""
        x, text = repeated_rows(x, context.rows), folded(self.attn2, context)
        if text is None:
            return self.ops.add(call(self.attn2, repeated_rows(normed, context.rows), context), x)
        return text.added(x, normed if len(normed) == 1 else repeated_rows(normed, context.rows))

    # The same in three steps, with sums as parts of products. What a step was given is free when it has returned.

    def self_attention_step(self, x: Tensor, context: Context, product: ResidualAttention | None) -> Tensor:
        if self.only_cross_attention:
            x = repeated_rows(x, context.rows)
        normed = self.ops.layer_norm(x, self.norm1)
        if product is not None:
            return product.added(x, normed, self.attn1)
        return self.ops.add(call(self.attn1, normed, context if self.only_cross_attention else None), x)

    def cross_attention_step(self, x: Tensor, context: Context) -> Tensor:
        return self._cross_attention(x, self.ops.layer_norm(x, self.norm2), context)

    def feed_forward_step(self, x: Tensor, *, bias_elsewhere: bool) -> Tensor:
        """``bias_elsewhere``: the last layer's bias is added by what follows the block."""
        if bias_elsewhere and isinstance(self.ff, OptimizedFeedForward):
            return self.ff.added_without_bias(x, self.norm3, self.ops)
        return self.ops.add(self.ff(self.ops.layer_norm(x, self.norm3)), x)


class OptimizedFeedForward(FeedForward):
    """``FeedForward``, whose last product can be part of another operation."""

    @property
    def last(self) -> nn.Linear:
        layer = self.net[2]
        assert isinstance(layer, nn.Linear)
        return layer

    def added_without_bias(self, x: Tensor, norm: nn.LayerNorm, ops: Ops) -> Tensor:
        """``x`` [B, N, D] plus the layer's output for ``norm(x)``, but for the last bias."""
        geglu = self.net[0]
        if isinstance(geglu, OptimizedGEGLU):
            h = gated(geglu.proj(ops.layer_norm(x, norm)))  # the norm is free as soon as it is multiplied
        else:
            h = geglu(ops.layer_norm(x, norm))
        return torch.addmm(x.flatten(0, 1), h.flatten(0, 1), self.last.weight.t()).view_as(x)


class FusedResiduals(Protocol):
    """What turns the sums of one transformer into parts of its products."""

    bias: Tensor  # [C], of the last projection with the last block's carried through it

    def self_attention(self, block: BasicTransformerBlock) -> ResidualAttention | None: ...


class OptimizedTransformer2D(Transformer2DModel):
    """``Transformer2DModel``."""

    ops: Ops = EAGER
    fused_residuals: FusedResiduals | None = None

    def forward(self, x: Tensor, context: Tensor | Context, *, donated: bool = False) -> Tensor:
        """From [B, C, h, w] and R texts to [R, C, h, w]; a ``donated`` x may be overwritten."""
        context = Context.of(context)
        if torch.is_grad_enabled():
            return super().forward(repeated_rows(x, context.rows), context.tensor)
        if self.fused_residuals is not None:
            return self._with_fused_residuals(x, context, self.fused_residuals)
        tokens, bias_added = self._enter(x, donated)
        for block in self.transformer_blocks:
            steered = isinstance(block, OptimizedTransformerBlock)
            tokens = block(tokens, context) if steered else block(repeated_rows(tokens, context.rows), context.tensor)
        if bias_added:
            x = repeated_rows(x, context.rows)
            return to_map(self.ops.linear_add(tokens, self.proj_out, to_tokens(x), bias_added), like=x)
        x = viewed_rows(x, context.rows)
        return x + to_map(self.proj_out(tokens), like=x)  # x first: a sum takes the memory format of its first term

    def _enter(self, x: Tensor, donated: bool) -> tuple[Tensor, bool]:
        """The tokens of the first block, and whether the last projection's bias is in ``x`` now."""
        if not donated:
            return self.proj_in(to_tokens(self.ops.group_norm(x, self.norm))), False
        normed, bias_added = self.ops.group_norm_before(x, self.norm, self.proj_out)
        return self.proj_in(to_tokens(normed)), bias_added

    def _with_fused_residuals(self, x: Tensor, context: Context, fused: FusedResiduals) -> Tensor:
        tokens = self.proj_in(to_tokens(self.ops.group_norm(x, self.norm)))
        for block in self.transformer_blocks:
            assert isinstance(block, OptimizedTransformerBlock), "the pass looked at all of them"
            tokens = block.self_attention_step(tokens, context, fused.self_attention(block))
            tokens = block.cross_attention_step(tokens, context)
            tokens = block.feed_forward_step(tokens, bias_elsewhere=block is self.transformer_blocks[-1])
        x = viewed_rows(x, context.rows)
        return x + to_map(flat_linear(tokens, self.proj_out.weight.flatten(1), fused.bias), like=x)


def call(layer: nn.Module, x: Tensor, context: Context | None) -> Tensor:
    """An attention layer; one that is not ours to steer gets the text as it is."""
    if isinstance(layer, OptimizedAttention) or context is None:
        return layer(x) if context is None else layer(x, context)  # type: ignore[no-any-return]
    return layer(x, context.tensor)  # type: ignore[no-any-return]


def folded(layer: nn.Module, context: Context) -> FoldedAttention | None:
    """The text in a layer's weights; None where it is not."""
    return context.folded(layer) if isinstance(layer, OptimizedAttention) else None
