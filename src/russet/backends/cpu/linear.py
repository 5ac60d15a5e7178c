"""Linear layers by oneDNN."""

from __future__ import annotations

from torch import Tensor, nn

from russet.backends.cpu import onednn
from russet.models.transformer import TokenProjection


class OneDNNLinear(nn.Linear):
    """``nn.Linear``."""

    prepacked: onednn.PrepackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:
        return onednn.linear(input, self.weight, self.bias, self.prepacked)


class OneDNNTokenProjection(TokenProjection):
    """``TokenProjection``."""

    prepacked: onednn.PrepackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:
        return onednn.linear(input, self.weight.flatten(1), self.bias, self.prepacked)
