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
from russet.backends.blocks.unet import OptimizedCrossAttnMidBlock, OptimizedMidBlock, OptimizedUNet
from russet.backends.blocks.vae import OptimizedDecoder, OptimizedEncoder, OptimizedVAEAttention
from russet.backends.ops import hooked
from russet.models import vae_blocks
from russet.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from russet.models.transformer import GEGLU, Attention, BasicTransformerBlock, FeedForward, Transformer2DModel
from russet.models.unet import UNet2DConditionModel
from russet.models.unet_blocks import UNetMidBlock2D, UNetMidBlock2DCrossAttn
from russet.models.vae_blocks import Decoder, Encoder, UpDecoderBlock2D, VAEAttention
from russet.passes.base import OWN, Changes, is_compiled, untouched

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
    UNetMidBlock2D: OptimizedMidBlock,
    UNetMidBlock2DCrossAttn: OptimizedCrossAttnMidBlock,
    UNet2DConditionModel: OptimizedUNet,
}


CONTAINERS = {nn.ModuleList, nn.Sequential, UpDecoderBlock2D, vae_blocks.UNetMidBlock2D}
"""Classes of modules that only hold others."""


def optimize_blocks(network: nn.Module, changes: Changes) -> None:
    """Gives every block that is as Russet made it its optimized class; does nothing the second time."""
    if not changes.blocks_optimized:
        changes.blocks_optimized = True
        _visit(network, changes)


def _visit(module: nn.Module, changes: Changes) -> bool:
    """Optimizes the blocks in a module; whether all of it is as Russet made it, or as a pass has left it."""
    if is_compiled(module):
        return False
    whole = is_known(module)
    for name, child in module._modules.items():
        if child is not None:
            child_whole = _visit(child, changes)
            whole = whole and (child_whole or is_dropout(module, name, child))
    if type(module) in OPTIMIZED and is_ours(module, whole):
        changes.set_class(module, OPTIMIZED[type(module)])
    return whole


def is_ours(block: nn.Module, whole: bool) -> bool:
    """Whether nobody watches a block, nor has put anything else in place of what it computes with.

    whole: nobody has changed anything beneath it.
    """
    if hooked(block):
        return False
    # These call the blocks that they hold, whatever they are, and read no more than layers of their own.
    if isinstance(block, Transformer2DModel):
        return all(map(untouched, (block.norm, block.proj_in, block.proj_out)))
    if isinstance(block, (UNet2DConditionModel, Encoder)):
        return all(map(untouched, (block.conv_in, block.conv_norm_out, block.conv_out)))
    if isinstance(block, (UNetMidBlock2D, UNetMidBlock2DCrossAttn)):
        return True
    # A decoder's layers overwrite what the one before them gave: each must be ours, as in the smaller blocks.
    return whole


def is_dropout(module: nn.Module, name: str, child: nn.Module) -> bool:
    """Whether a child is that of a feed-forward layer that computes something in training alone."""
    return (
        type(module) is nn.Sequential and name == "1" and type(child) in (nn.Identity, nn.Dropout) and not hooked(child)
    )


def is_known(module: nn.Module) -> bool:
    """Whether a module by itself is as Russet made it, or as a pass has left it."""
    if type(module) in OWN:
        return untouched(module)
    ours = type(module) in CONTAINERS or type(module) in OPTIMIZED
    return (ours or type(module).__module__.startswith("russet.backends.")) and not hooked(module)
