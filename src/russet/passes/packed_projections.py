"""Packed projections: linear layers of one input as one product.

Queries, keys and values of self-attention are one product instead of three, and the time's projections in all residual
blocks one instead of twenty-two. Nothing is stored twice: each layer's parameter becomes a view of a shared tensor,
under its own name, as the same ``nn.Parameter``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from russet.backends.blocks.resnet import OptimizedResnet
from russet.backends.blocks.transformer import OptimizedAttention
from russet.backends.blocks.unet import OptimizedUNet
from russet.backends.gemm_heuristics import ONES
from russet.backends.ops import flat_linear
from russet.passes.base import LAYER_BY_LAYER, Changes, Choices, Footprint, Pass, Situation
from russet.passes.blocks import optimize_blocks


class Packed:
    """One parameter of each of some layers as parts of one tensor. spare: rows of zeros behind them."""

    def __init__(self, layers: Sequence[nn.Module], name: str, spare: int = 0) -> None:
        parts = [layer._parameters[name] for layer in layers]
        self.parts = [part for part in parts if part is not None]
        assert len(self.parts) == len(parts), "every layer has the parameter"
        rows = sum(len(part) for part in self.parts)
        self.with_spare = packed_already(self.parts, rows + spare)
        if self.with_spare is None:
            first = self.parts[0]
            self.with_spare = torch.cat(
                [*(part.detach() for part in self.parts), first.new_zeros(spare, *first.shape[1:])]
            )
            place = 0
            for part in self.parts:
                part.data = self.with_spare[place : (place := place + len(part))]
        self.whole = self.with_spare[:rows]


def packed_already(parts: Sequence[Tensor], rows: int) -> Tensor | None:
    """The tensor of so many rows that the parts, one after another, are all views of; None where they are not."""
    first = parts[0]
    numbers = rows * first[0].numel() if first.ndim > 1 else rows
    storage: Any = getattr(first, "untyped_storage", first.storage)()  # PyTorch 1.13 has the second alone
    address, size = storage.data_ptr(), first.element_size()
    if storage.nbytes() != numbers * size or not all(part.is_contiguous() for part in parts):
        return None
    for part in parts:  # addresses within one piece of memory: nobody else's can lie between them
        if part.data_ptr() != address:
            return None
        address += part.numel() * size
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), 0)


class PackedLinears:
    """Linear layers of one input as one product."""

    def __init__(self, layers: Sequence[nn.Linear], spare: int = 0) -> None:
        self.layers = tuple(layers)
        self.weights = Packed(layers, "weight", spare)
        self.biases = Packed(layers, "bias") if all(layer.bias is not None for layer in layers) else None

    def product(self, x: Tensor) -> Tensor:
        """The outputs of all layers for ``x`` [..., Din], side by side."""
        return flat_linear(x, self.weights.whole, None if self.biases is None else self.biases.whole)


class PackedTimeProjections:
    """The time's projections in residual blocks, and the biases of the convolutions that their outputs are added to."""

    def __init__(self, blocks: Sequence[OptimizedResnet]) -> None:
        self.projections = [block.time_emb_proj for block in blocks if block.time_emb_proj is not None]
        self.linears = PackedLinears(self.projections)
        self.conv_biases = Packed([block.conv1 for block in blocks], "bias")

    def shifts(self, emb: Tensor) -> Mapping[nn.Module, Tensor]:
        """Projection → its output for ``emb`` [B or 1, D], with its convolution's bias."""
        pairs = emb.repeat(2, 1) if len(emb) == 1 and emb.device.type == "mps" else emb  # see ``PairedLinear``
        outputs = self.linears.product(pairs)[: len(emb)] + self.conv_biases.whole
        rows = [layer.out_features for layer in self.projections]
        return dict(zip(self.projections, outputs.split(rows, dim=-1), strict=True))  # type: ignore[no-untyped-call]


def decide(situation: Situation) -> tuple[bool, str]:
    if situation.decided["offload"] == "sequential":
        return False, LAYER_BY_LAYER
    return True, "one large matrix product keeps the GPU busier than three smaller ones"


def apply(network: nn.Module, name: str, choices: Choices, changes: Changes) -> None:
    optimize_blocks(network, changes)
    for module in changes.modules:
        if isinstance(module, OptimizedAttention) and packs(module):
            changes.set(module, "packed", PackedLinears([module.to_q, module.to_k, module.to_v], spare=ONES))
    if isinstance(network, OptimizedUNet):
        blocks = [block for block in changes.modules if isinstance(block, OptimizedResnet) and adds_time(block)]
        if blocks and alike([block.time_emb_proj for block in blocks if block.time_emb_proj is not None]):
            changes.set(network, "packed_time", PackedTimeProjections(blocks))


def packs(layer: OptimizedAttention) -> bool:
    """Whether a layer's three projections have one input, the tokens themselves, and are of one kind."""
    return not layer.is_cross_attention and alike([layer.to_q, layer.to_k, layer.to_v])


def alike(layers: Sequence[nn.Linear]) -> bool:
    """Whether layers can be one: of one width and dtype, and all or none with a bias, which one put in may have."""
    return len({(one.in_features, one.weight.dtype, one.weight.device, one.bias is None) for one in layers}) == 1


def adds_time(block: OptimizedResnet) -> bool:
    """Whether the time is added to what a block's first convolution gives, and nothing else done with it."""
    return block.time_emb_proj is not None and not block.scale_shift and type(block.conv1) is nn.Conv2d


PASS = Pass(
    name="packed_projections",
    meaning="True: weights that multiply the same input (queries, keys, values) are packed into one",
    off=False,
    devices=("mps", "cuda"),
    elsewhere="one large matrix product is no faster than three smaller ones on a CPU",
    decide=decide,
    apply=apply,
    footprint=lambda situation: Footprint(walk={"donates": True}),
)
