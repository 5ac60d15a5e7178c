"""What the self-test computes: each operation that the networks use, the ways to attend, and tiny whole networks.

A case makes its float32 inputs from a seeded generator, and turns them into one tensor. Run on the CPU in float32 it
is the reference; run on the device it is what the networks would get there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from russet import passes
from russet.backends import ops
from russet.backends.blocks.unet import OptimizedUNet
from russet.backends.layers import ComposedGroupNorm, Float32LayerNorm
from russet.models import attention
from russet.models.activations import ACTIVATIONS
from russet.models.base import Model
from russet.models.clip_text import CLIPTextModel
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL
from russet.passes.base import Choices
from russet.passes.prompt_cache import cached_prompt
from russet.planning.workload import Workload


@dataclass(frozen=True)
class Case:
    """``compute`` turns tensors of the ``shapes`` (standard normal numbers) into one tensor, on any device and dtype.

    ``tolerance`` multiplies what rounding alone may change. Where one of the defects ``avoided_for`` is known to hold,
    Russet does not compute like this, and neither does the test: it could end the whole process.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    compute: Callable[..., Tensor]
    tolerance: float = 1.0
    avoided_for: tuple[str, ...] = ()


def inputs(shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    """Standard normal numbers, float32 on the CPU, the same every time."""
    generator = Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]


MAP = (2, 32, 16, 16)
TOKENS = (2, 64, 32)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, *, composed: bool) -> Tensor:
    norm = nn.GroupNorm(8, 32).to(x)
    norm.weight.data, norm.bias.data = weight, bias
    norm.__class__ = ComposedGroupNorm if composed else nn.GroupNorm
    return norm(x)  # type: ignore[no-any-return]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, wide: bool) -> Tensor:
    norm = nn.LayerNorm(32).to(x)
    norm.weight.data, norm.bias.data = weight, bias
    norm.__class__ = Float32LayerNorm if wide else nn.LayerNorm
    return norm(x)  # type: ignore[no-any-return]


def gated(x: Tensor, weight: Tensor) -> Tensor:
    value, gate = ops.flat_linear(x, weight).chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


def embedded(table: Tensor) -> Tensor:
    return F.embedding(torch.arange(0, 60, 7, device=table.device), table)


def furthest(x: Tensor) -> Tensor:
    """Where rows of whole numbers are largest, as the text encoder finds the end of a prompt."""
    return (100 * x.float()).to(torch.int32).argmax(dim=-1).to(x.dtype)


def hidden_future(x: Tensor) -> Tensor:
    place = torch.arange(x.shape[-1], device=x.device)
    return (x + x.new_zeros(x.shape[-1], x.shape[-1]).masked_fill_(place > place[:, None], -1e4)).softmax(-1)


def together_again(x: Tensor, y: Tensor) -> Tensor:
    """Writes heads into part of what lies side by side, and multiplies the rows there with transposed weights."""
    rows = (x + 0).view(2, 64, 4, 8)
    rows[:, :, 2].copy_(y.view(2, 8, 64).transpose(1, 2))
    return rows.view(128, 32)[:, 16:]


def seen_twice(x: Tensor, y: Tensor) -> Tensor:
    """A sum with, and a joining of, one row that is only seen as two."""
    one = x[:1].expand(2, -1, -1, -1)
    return torch.cat([one + y, one], dim=1)


OPERATIONS = (
    Case("convolution 3×3", (MAP, (64, 32, 3, 3), (64,)), lambda x, w, b: F.conv2d(x, w, b, padding=1)),
    Case("convolution 3×3, stride 2", (MAP, (64, 32, 3, 3)), lambda x, w: F.conv2d(x, w, stride=2, padding=1)),
    Case("convolution 1×1", (MAP, (64, 32, 1, 1)), F.conv2d),
    Case("linear", (TOKENS, (48, 32), (48,)), F.linear, avoided_for=("batched-linear", "batched-linear-m5")),
    Case("linear on one long row of tokens", (TOKENS, (48, 32), (48,)), ops.flat_linear),
    Case(
        "linear on strided tokens",
        (MAP, (48, 32)),
        lambda x, w: F.linear(x.permute(0, 2, 3, 1).flatten(1, 2), w),
        avoided_for=("batched-linear-m5",),
    ),
    Case("group norm", (MAP, (32,), (32,)), lambda x, w, b: group_norm(x, w, b, composed=False)),
    Case("group norm, composed", (MAP, (32,), (32,)), lambda x, w, b: group_norm(x, w, b, composed=True)),
    Case(
        "layer norm",
        (TOKENS, (32,), (32,)),
        lambda x, w, b: layer_norm(x, w, b, wide=False),
        avoided_for=("half-layer-norm",),
    ),
    Case("layer norm in float32", (TOKENS, (32,), (32,)), lambda x, w, b: layer_norm(x, w, b, wide=True)),
    Case("silu in place", (MAP,), lambda x: ACTIVATIONS["silu"](x + 0)),
    Case("gelu", (TOKENS,), ACTIVATIONS["gelu"]),
    Case("quick gelu", (TOKENS,), lambda x: ACTIVATIONS["quick_gelu"](x + 0)),
    Case("gated linear", (TOKENS, (64, 32)), gated),
    Case("batched product", ((4, 64, 32), (4, 48, 32)), lambda q, k: q @ k.transpose(-1, -2)),
    Case("sum within a product", ((128, 48), (128, 64), (48, 32)), lambda x, a, w: torch.addmm(x, a[:, 8:40], w.t())),
    Case(
        "sum within a batched product",
        ((2, 64, 32), (1, 64, 2, 48), (2, 48, 32)),
        lambda x, a, b: torch.baddbmm(x, a.transpose(1, 2)[0], b),
    ),
    Case("heads put together", (TOKENS, (2, 8, 64)), together_again),
    Case("one row seen as two", (MAP, MAP), seen_twice),
    Case("weighted sums", (MAP, MAP), lambda x, y: torch.sub(torch.add(x, y, alpha=7.5), y, alpha=0.3)),
    Case("softmax", ((4, 64, 77),), lambda x: (3 * x).softmax(-1)),
    Case("hidden future", ((2, 77, 77),), hidden_future),
    Case("nearest upsampling", (MAP,), lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest")),
    Case("upsampling to a size", (MAP,), lambda x: F.interpolate(x, size=(31, 33), mode="nearest")),
    Case("zero padding", (MAP,), lambda x: F.pad(x, (0, 1, 0, 1))),
    Case("joining and splitting", (MAP, MAP), lambda a, b: torch.cat([a, b], dim=1).chunk(4, dim=1)[2] + b[:, :16]),
    Case("sums in place", (MAP, (2, 32)), lambda x, t: (x + 0).add_(t[:, :, None, None]).mul_(0.5)),
    Case("embedding", ((60, 32),), embedded),
    Case("argmax of whole numbers", ((4, 77),), furthest),
    Case("maximum and exponential", (TOKENS,), lambda x: (x - x.amax(-1, keepdim=True)).exp().sum(-1)),
    Case("mean", (MAP,), lambda x: x.float().mean(dim=(2, 3))),
    Case("variance", (MAP,), lambda x: x.float().var(dim=(2, 3), unbiased=False)),
    Case("clamp and round", (MAP,), lambda x: (x.clamp(-1, 1) * 8).round() / 8, tolerance=15),
    Case("sines", ((64,),), lambda x: torch.cat([x.float().sin(), x.float().cos()])),
    Case("copies between precisions", (MAP,), lambda x: x.float().to(x.dtype)),
)


def attending(
    name: str, how: attention.AttentionFunction, dim: int, queries: int = 256, keys: int | None = None
) -> Case:
    """Attention of 4 heads: ``queries`` tokens to ``keys`` others, by default to themselves."""
    shape, other = (2, 4, queries, dim), (2, 4, keys or queries, dim)
    return Case(f"attention, {name}", (shape, other, other), lambda q, k, v: how(q, k, v, dim**-0.5))


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(q.shape[2], device=q.device)
    mask = q.new_zeros(q.shape[2], q.shape[2]).masked_fill_(place > place[:, None], torch.finfo(q.dtype).min)
    return attention.fused(q, k, v, q.shape[-1] ** -0.5, mask)


PADDED = attention.padded(attention.fused, (64, 256))
ATTENTIONS = (
    *(attending(f"fused, heads of {dim}", attention.fused, dim) for dim in (40, 64, 80, 160, 512)),
    *(attending(f"fused, heads of {dim} padded", PADDED, dim) for dim in (40, 160)),
    attending("fused, to a text", attention.fused, 64, keys=77),
    attending("fused, few queries", attention.fused, 64, queries=5, keys=77),
    Case("attention, fused, hidden future", ((2, 4, 77, 64),) * 3, masked),
    attending("sliced", attention.sliced(3), 40),
    attending("chunked", attention.chunked(96), 40),
    attending("chunked both ways", attention.chunked(96, 100), 512),
    attending("chunked, float32 scores", attention.upcast(attention.chunked(96)), 160),
)

CASES = (*OPERATIONS, *ATTENTIONS)


@dataclass(frozen=True)
class NetworkCase:
    """A tiny network with random weights: ``make`` it, and ``run`` it on tensors of the ``shapes``.

    On the device it runs as the plan for the device says: attention, norms, memory format.
    """

    name: str
    component: str
    shapes: tuple[tuple[int, ...], ...]
    make: Callable[[], Model]
    run: Callable[..., Tensor]
    tolerance: float = 6.0

    def network(self) -> Model:
        """The network with the same weights every time; torch's global generator is left alone."""
        generator = torch.default_generator  # it alone, and not the devices' own
        state = generator.get_state()
        try:
            generator.manual_seed(0)
            return self.make()
        finally:
            generator.set_state(state)


def tiny_unet() -> Model:
    return UNet2DConditionModel(**TINY_UNET)


def tiny_vae() -> Model:
    return AutoencoderKL(**TINY_VAE)


def tiny_text() -> Model:
    return CLIPTextModel(**TINY_TEXT)


def drawn(unet: Model, x: Tensor, text: Tensor) -> Tensor:
    output: Tensor = unet(x, 500.0, text)[0]
    return output


def with_passes(unet: Model, x: Tensor, text: Tensor) -> Tensor:
    """As in a run on mps: with the prompt folded into weights, precomputed times, and residual fusion."""
    wanted = {
        "shared_prefix": True,
        "packed_projections": True,
        "residual_fusion": "with weight copies",
        "timestep_embeddings": "precomputed",
        "prompt_cache": "folded into weights",
    }
    changes = passes.apply(unet, "unet", Choices({**passes.OFF, **wanted}, rows=len(text)))
    assert isinstance(unet, OptimizedUNet)
    context = cached_prompt(unet, text, "folded into weights")
    output: Tensor = unet(x[:1], unet.precompute_times([900.0, 500.0])[1], context)[0]
    changes.undo()
    return output


def decoded(vae: Model, z: Tensor) -> Tensor:
    assert isinstance(vae, AutoencoderKL)
    return vae.decode(z)[0]


def encoded(vae: Model, x: Tensor) -> Tensor:
    assert isinstance(vae, AutoencoderKL)
    return vae.encode(x)[0].mean


def read(text: Model, x: Tensor) -> Tensor:
    output: Tensor = text(torch.arange(0, 77, device=x.device)[None] % 100)[0]
    return output


TINY_UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
TINY_VAE: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
}
TINY_TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WORKLOAD = Workload.of(unet=TINY_UNET, vae=TINY_VAE, text_encoder=TINY_TEXT, width=32, height=32)

NETWORKS = (
    NetworkCase("a tiny UNet", "unet", ((2, 4, 16, 16), (2, 77, 32)), tiny_unet, drawn),
    NetworkCase("a tiny UNet with passes", "unet", ((2, 4, 16, 16), (2, 77, 32)), tiny_unet, with_passes),
    NetworkCase("a tiny VAE, decoding", "vae", ((1, 4, 8, 8),), tiny_vae, decoded),
    NetworkCase("a tiny VAE, encoding", "vae", ((1, 3, 16, 16),), tiny_vae, encoded),
    NetworkCase("a tiny text encoder", "text_encoder", ((1,),), tiny_text, read),
)
