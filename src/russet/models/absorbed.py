"""Attention to a text with the text multiplied into the weights, once a prompt: three operations a call.

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

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Absorbed:
    """What one layer's weights and a text come to. keys: Aᵀ [R, H·M, C]. values: B [R, H·M, C]."""

    keys: Tensor
    values: Tensor
    heads: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, query: nn.Linear, out: nn.Linear, scale: float) -> Absorbed:
        """From keys and values [R, H, M, D] and the layers around them. Computed in float32, and rounded once."""
        heads, dim = keys.shape[1], keys.shape[3]
        inward = query.weight.float().view(heads, dim, -1)
        outward = out.weight.float().view(-1, heads, dim).permute(1, 2, 0).contiguous()
        a = (keys.float() * scale) @ inward
        b = values.float() @ outward
        if out.bias is not None:
            b = b + out.bias.float() / heads
        return cls(a.flatten(1, 2).to(keys.dtype), b.flatten(1, 2).to(keys.dtype), heads)

    def added(self, x: Tensor, normed: Tensor) -> Tensor:
        """x [R, N, C] plus what the texts say to ``normed``: [R, N, C], or [1, N, C] where all are about one row."""
        rows, tokens, _ = normed.shape
        keys = self.keys.view(rows, -1, self.keys.shape[2])
        scores = torch.bmm(normed, keys.transpose(1, 2)).view(rows, tokens, len(x) // rows, self.heads, -1)
        weights = scores.softmax(-1).flatten(3).transpose(1, 2).flatten(0, 1)
        return torch.baddbmm(x, weights, self.values)
