"""The VAE's two halves, in place and on donated buffers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from russet.backends.blocks.inputs import Context
from russet.backends.blocks.resnet import OptimizedResnet
from russet.backends.blocks.transformer import OptimizedAttention
from russet.backends.donation import Donated
from russet.backends.ops import EAGER, Ops, whole_conv
from russet.models.transformer import to_map, to_tokens
from russet.models.vae_blocks import Decoder, Encoder, VAEAttention


class OptimizedEncoder(Encoder):
    """``Encoder``."""

    ops: Ops = EAGER

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        x = whole_conv(self.ops, x, self.conv_in)
        for layer in self.layers:
            x = layer(x)
        x = self.ops.group_norm(self.mid_block(x), self.conv_norm_out, F.silu)
        return whole_conv(self.ops, x, self.conv_out)


class OptimizedDecoder(Decoder):
    """``Decoder``."""

    ops: Ops = EAGER

    def forward(self, z: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(z)
        x = self.mid_block(whole_conv(self.ops, z, self.conv_in))
        for layer in self.layers:
            if isinstance(layer, OptimizedResnet):
                given = Donated(x)
                del x
                x = layer(given)
            else:
                x = layer(x)
        return whole_conv(self.ops, self.ops.group_norm(x, self.conv_norm_out, F.silu), self.conv_out)


class OptimizedVAEAttention(OptimizedAttention, VAEAttention):
    """``VAEAttention``."""

    ops: Ops = EAGER

    def forward(self, x: Tensor, context: Tensor | Context | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return VAEAttention.forward(self, x)
        tokens = OptimizedAttention.forward(self, to_tokens(self.ops.group_norm(x, self.group_norm)))
        return x + to_map(tokens, like=x)
