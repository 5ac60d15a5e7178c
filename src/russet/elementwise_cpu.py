"""The steps of UNet and VAE on a CPU: convolutions with fewer multiplications, and products by the faster library."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from russet import onednn, winograd, winograd_sizes
from russet.elementwise import Plain, hooked


@dataclass(frozen=True)
class OnCPU(Plain):
    """PyTorch's own operations but for two kinds of convolution in float32, where no gradient is wanted.

    by_winograd: those of 3×3, where it is worth it, by ``russet.winograd``. by_onednn: those of 1×1 as products
    by oneDNN.
    """

    by_winograd: bool = True
    by_onednn: bool = True

    def convolved(
        self, x: Tensor, conv: nn.Conv2d, shift: Tensor | None = None, *, whole: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if self.by_onednn and conv.kernel_size == (1, 1) and shift is None and simple(x, conv, padding=0):
            y = onednn.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias)
            return y.permute(0, 3, 1, 2), None
        if self.filters(x, conv, *x.shape[2:]):
            return winograd.convolved(x, conv.weight, everything_added(conv, shift, whole)), None
        return super().convolved(x, conv, shift, whole=whole)

    def doubled(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        if self.filters(x, conv, 2 * x.shape[2], 2 * x.shape[3]):
            return winograd.convolved(x, conv.weight, everything_added(conv), doubled=True)
        return super().doubled(x, conv)

    def filters(self, x: Tensor, conv: nn.Conv2d, height: int, width: int) -> bool:
        """Whether Winograd's way is taken to results [B, Cout, H, W]."""
        return (
            self.by_winograd
            and conv.kernel_size == (3, 3)
            and simple(x, conv, padding=1)
            and winograd_sizes.pays(len(x), conv.in_channels, conv.out_channels, height, width)
        )


def simple(x: Tensor, conv: nn.Conv2d, padding: int) -> bool:
    """Whether a convolution is nothing but its weights, and ours to compute."""
    plain = conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    own = type(conv) is nn.Conv2d and not hooked(conv)
    return plain and own and conv.padding == (padding, padding) and onednn.takes(x, conv.weight)


def everything_added(conv: nn.Conv2d, shift: Tensor | None = None, whole: bool = False) -> Tensor | None:
    """A convolution's bias and the shift [1 or B, Cout] together; a ``whole`` shift has the bias in it."""
    if conv.bias is None or whole:
        return shift
    return conv.bias[None] if shift is None else shift + conv.bias
