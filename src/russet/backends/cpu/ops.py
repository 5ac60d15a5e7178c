"""The steps of UNet and VAE on a CPU: convolutions with fewer multiplications, and products by the faster library."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from russet.backends.cpu import onednn, winograd, winograd_heuristics
from russet.backends.ops import Plain, hooked

FEW = 128  # places in all rows, and channels at least


@dataclass(frozen=True)
class OnCPU(Plain):
    """PyTorch's own operations but for some convolutions in float32, where no gradient is wanted.

    by_winograd: those of 3×3, where it is worth it, by ``winograd.py``. by_onednn: those of 1×1, and of 3×3 with few
    places, as products by oneDNN.
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
        if self.by_onednn and few(x, conv) and simple(x, conv, padding=1):
            h = of_patches(x, conv.weight, None if whole else conv.bias)
            return h if shift is None else h.add_(shift[:, :, None, None]), None
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
            and winograd_heuristics.pays(len(x), conv.in_channels, conv.out_channels, height, width)
        )


def few(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether a 3×3 convolution has so few places that its weights are most of the work.

    oneDNN's convolution puts them in another order at every call; its product does not. On a Zen 4, one thread: 39.5
    against 46.0 ms for 1280 channels at 8×8 (two rows), and 146 against 141 at 16×16.
    """
    return conv.kernel_size == (3, 3) and len(x) * x.shape[2] * x.shape[3] <= FEW <= min(conv.weight.shape[:2])


def of_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3×3 convolution, one pixel of zeros around the map, as one product of all patches with all filters."""
    framed = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    patches = framed.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)
    return onednn.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


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
