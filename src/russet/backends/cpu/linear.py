"""Linear layers by oneDNN."""

from __future__ import annotations

from torch import Tensor, nn

from russet.backends.cpu import onednn
from russet.models.transformer import TokenProjection


class OneDNNLinear(nn.Linear):
    """``nn.Linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return onednn.linear(input, self.weight, self.bias)


class OneDNNTokenProjection(TokenProjection):
    """``TokenProjection``."""

    def forward(self, input: Tensor) -> Tensor:
        return onednn.linear(input, self.weight.flatten(1), self.bias)
