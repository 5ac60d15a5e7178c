"""Gives a network's blocks the form that passes can steer, where nobody has changed them."""

from __future__ import annotations

from torch import nn

from russet.backends.blocks.resnet import OptimizedDownsample, OptimizedResnet, OptimizedUpsample
from russet.backends.blocks.transformer import (
    OptimizedAttention,
    OptimizedFeedForward,
    OptimizedGEGLU,
    OptimizedTransformer2D,
    OptimizedTransformerBlock,
)
from russet.backends.blocks.unet import OptimizedUNet
from russet.backends.blocks.vae import OptimizedDecoder, OptimizedEncoder, OptimizedVAEAttention
from russet.backends.ops import hooked
from russet.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from russet.models.transformer import GEGLU, Attention, BasicTransformerBlock, FeedForward, Transformer2DModel
from russet.models.unet import UNet2DConditionModel
from russet.models.vae_blocks import Decoder, Encoder, VAEAttention
from russet.passes.base import OWN, Changes, untouched

OPTIMIZED: dict[type[nn.Module], type[nn.Module]] = {
    GEGLU: OptimizedGEGLU,
    FeedForward: OptimizedFeedForward,
    Attention: OptimizedAttention,
    VAEAttention: OptimizedVAEAttention,
    BasicTransformerBlock: OptimizedTransformerBlock,
    Transformer2DModel: OptimizedTransformer2D,
    ResnetBlock2D: OptimizedResnet,
    Downsample2D: OptimizedDownsample,
    Upsample2D: OptimizedUpsample,
    Encoder: OptimizedEncoder,
    Decoder: OptimizedDecoder,
    UNet2DConditionModel: OptimizedUNet,
}


KNOWN = {*OWN, *OPTIMIZED, *OPTIMIZED.values(), nn.ModuleList, nn.Sequential}
"""Classes of modules that are as Russet made them."""


def optimize_blocks(network: nn.Module, changes: Changes) -> None:
    """Gives every block that is as Russet made it its optimized class; does nothing the second time."""
    if not changes.blocks_optimized:
        changes.blocks_optimized = True
        if network not in changes.skipped:
            _optimize(network, changes)


def _optimize(module: nn.Module, changes: Changes) -> tuple[bool, bool]:
    """Whether a module with all beneath it is as Russet made it, and whether no hook watches any of them."""
    known, watched, cls = type(module) in KNOWN, hooked(module), type(module)
    unhooked = not watched
    for child in module._modules.values():
        if child is not None and child in changes.skipped:
            known = False
        elif child is not None:
            child_known, child_unhooked = _optimize(child, changes)
            known, unhooked = known and child_known, unhooked and child_unhooked
    if cls in OPTIMIZED and is_ours(module, known and unhooked, unhooked):
        changes.set_class(module, OPTIMIZED[cls])
    return known, unhooked


def is_ours(block: nn.Module, whole: bool, unhooked: bool) -> bool:
    """Whether nobody watches a block, nor has put anything else in place of what it computes with.

    whole: nothing beneath it was changed. unhooked: no hook watches any of it.
    """
    if isinstance(block, (UNet2DConditionModel, Encoder)):  # they call what they hold, whatever it is
        return True
    if isinstance(block, Transformer2DModel):
        return not hooked(block) and all(untouched(layer) for layer in (block.norm, block.proj_in, block.proj_out))
    if isinstance(block, Decoder):  # a layer's output is overwritten by the next one
        return unhooked
    return whole
