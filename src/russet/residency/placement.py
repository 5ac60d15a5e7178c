"""Carries a plan out: where the networks are, in which precision and layout, and how they attend.

The plan (``russet.planning.plan``) decides; nothing here does. What each decision asks for is said in
``russet.planning.plan_types.MEANING``.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from russet.backends.cpu import malloc
from russet.backends.cpu.ops import OnCPU
from russet.backends.ops import PLAIN, Elementwise
from russet.checkpoints.pending_weights import Draft
from russet.models import attention
from russet.models.activations import silu
from russet.models.attention import Attention
from russet.models.autoencoder import Autoencoder
from russet.models.base import Model, hand
from russet.models.linears import set_linears
from russet.models.modules import modules, places, weights
from russet.models.norms import set_norms
from russet.models.tiling import Tiling
from russet.planning.device_defaults import allocator_environment
from russet.planning.memory import unet_rows
from russet.planning.plan import AttentionChoice, Plan, Tile

if TYPE_CHECKING:
    from russet.backends.triton.ops import Fused
    from russet.backends.triton.warmup import KernelsAhead

CPU, META = torch.device("cpu"), torch.device("meta")
CACHE_LINE = 64  # bytes; torch's allocator begins all that it gives at a multiple of this
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def dtype_named(name: str) -> torch.dtype:
    """``"float16"`` → ``torch.float16``."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float16`` → ``"float16"``."""
    return str(dtype).removeprefix("torch.")


def attention_of(plan: Plan, component: str, *, upcast: bool = False) -> Attention:
    """The attention that the plan chose for a component; ``upcast`` insists on float32 scores."""
    choice = plan.precise_attention(component) if upcast else plan.attention(component)
    return built(choice, contiguous=plan["contiguous_attention"])


def built(choice: AttentionChoice, *, contiguous: bool = False) -> Attention:
    """An attention as described, inside out: the kind, then float32 scores, then padded heads, then contiguity."""
    made: Attention = attention.fused
    if choice.kind == "sliced":
        made = attention.sliced(choice.rows or 1)
    elif choice.kind == "chunked":
        made = attention.chunked(choice.queries or 1, choice.keys)
    if choice.upcast:
        made = attention.upcast(made)
    if choice.pad:
        made = attention.padded(made, choice.pad)
    return attention.contiguous(made) if contiguous else made


def steps_of(plan: Plan) -> Elementwise:
    """The steps between the matrix products as the plan wants them."""
    if plan["ops"] == "triton":
        return fused_steps(plan["fused_geglu"], plan["upsample_fusion"])
    winograd, onednn = plan["winograd"], plan["onednn_linear"]
    return OnCPU(by_winograd=winograd, by_onednn=onednn) if winograd or onednn else PLAIN


def compile_kernels(plan: Plan, device: torch.device) -> None:
    """Has kernels of ours compiled while weights are moved and read."""
    if plan["ops"] == "triton":
        for dtype in {plan.dtype("unet"), plan.dtype("vae")}:
            kernels(plan["fused_geglu"], plan["upsample_fusion"]).prepare(device, dtype_named(dtype))


@functools.cache
def fused_steps(gated_products: bool, transposed: bool) -> Fused:
    from russet.backends.triton.ops import Fused  # Triton is there where the plan chose it

    return Fused(silu, gated_products, transposed, kernels(gated_products, transposed).failed)


@functools.cache
def kernels(gated_products: bool, transposed: bool) -> KernelsAhead:
    from russet.backends.triton.warmup import KernelsAhead

    return KernelsAhead(gated_products, transposed)


def set_environment(device: torch.device) -> None:
    """Sets the variables that a device's allocator reads when it starts, unless the user has set any of them.

    One of the user's and one of ours could contradict each other, which ends in an error when the device starts.
    """
    variables = allocator_environment(device.type)
    if not variables.keys() & os.environ.keys():
        os.environ.update(variables)


def carry_out(plan: Plan, networks: Mapping[str, nn.Module]) -> None:
    """Hands every network what the plan chose for it: attention, norms, linear layers, and the steps between."""
    steps = steps_of(plan)
    composed, wide = plan["group_norm"] == "composed", plan["layer_norm"] == "float32"
    for name, network in networks.items():
        listed = modules(network, anew=True)
        set_norms(listed, composed_groups=composed, float32_layers=wide)
        set_linears(
            listed, "flat" if plan["flatten_linear_inputs"] else "onednn" if plan["onednn_linear"] else "native"
        )
        if name in ("text_encoder", "unet", "vae"):
            hand(listed, attention=attention_of(plan, name), steps=steps)


@contextlib.contextmanager
def tiled(vae: Autoencoder, tile: Tile | None) -> Iterator[None]:
    """Has the VAE work in the plan's tiles for as long as the block lasts; None leaves it as it is."""
    before = vae.tiling
    if tile is not None:
        vae.tiling = Tiling(tile.size, tile.overlap)
    try:
        yield
    finally:
        vae.tiling = before


def layout(module: nn.Module, memory_format: str) -> None:
    """Puts the weights of all convolutions in a memory format; other parameters have only one."""
    wanted = MEMORY_FORMATS[memory_format]
    for child in modules(module):
        if isinstance(child, nn.Conv2d) and not child.weight.is_contiguous(memory_format=wanted):
            child.weight.data = child.weight.data.contiguous(memory_format=wanted)


def align(module: nn.Module) -> None:
    """Gives weights on the CPU that lie askew in a mapped file a place of their own, as good as torch itself gives.

    The CPU's kernels round a little differently where numbers do not begin at a cache line, so that the same weights
    would draw another picture out of another file.
    """
    for value in weights(module):
        begins = value.storage_offset() == 0  # others are parts of what was laid together
        if value.device.type == "cpu" and begins and value.data_ptr() % CACHE_LINE:
            value.data = value.data.clone()


def home(component: str, plan: Plan, device: torch.device) -> torch.device:
    """Where a network is while it does not work; ``meta`` where its weights are dropped and read again when needed."""
    if component == "text_encoder" and plan.text_encoder == "cpu":
        return CPU
    if plan.offload == "sequential":
        return CPU
    if plan.offload == "model" or (component == "text_encoder" and plan.text_encoder == "unloaded"):
        return {"cpu": CPU, "disk": META, "device": device}[plan["offload_target"]]
    return device


def size(network: nn.Module) -> int:
    """How many numbers the weights of a network are."""
    if isinstance(network, Model):
        return network.size
    return sum(parameter.numel() for parameter in network.parameters())


def is_at(network: nn.Module, place: torch.device) -> bool:
    """Whether a network's weights are at a place; "cuda" is whichever GPU they are on."""
    at = next(network.parameters()).device
    return at.type == place.type and place.index in (None, at.index)


def is_empty(network: nn.Module) -> bool:
    """Whether a network's weights are not in memory. Some of one that was never filled may be, which it made itself."""
    return any(parameter.device == META for parameter in network.parameters())


def settle(component: str, network: nn.Module, plan: Plan, device: torch.device, draft: Draft | None) -> None:
    """Puts a network on a device in the plan's precision, its weights read again if they were dropped.

    Weights that move take the plan's layout on the way. Those on the CPU may be a mapped file's, which taking a layout
    would copy; that waits until they work.
    """
    dtype = dtype_named(plan.dtype(component))
    if is_empty(network) and device != META:
        assert draft is not None, "weights are only dropped where they can be read again"
        wanted = "contiguous" if device.type == "cpu" else plan.memory_format
        draft.refill(network, device=device, dtype=dtype, memory_format=MEMORY_FORMATS[wanted])
        return
    network.to(device, dtype)
    if device.type != "cpu":
        layout(network, plan.memory_format)


@contextlib.contextmanager
def at_work(
    component: str, network: nn.Module, plan: Plan, device: torch.device, draft: Draft | None
) -> Iterator[None]:
    """Has a network ready to work for as long as the block lasts, and puts it back where it rests."""
    rest = home(component, plan, device)
    if plan.offload == "sequential" and rest != device:
        layout(network, plan.memory_format)
        with streamed(network, device):
            yield
    elif rest == device or (component == "text_encoder" and plan.text_encoder == "cpu"):
        prepare(network, plan)
        with summing(component, network, plan), blocks_kept(component, plan):
            yield
    else:
        try:
            settle(component, network, plan, device, draft)
            prepare(network, plan)
            with summing(component, network, plan), blocks_kept(component, plan):
                yield
        finally:
            network.to(rest)


def blocks_kept(component: str, plan: Plan) -> contextlib.AbstractContextManager[None]:
    """Has the C library do with freed memory what the plan wants, while the block lasts."""
    rules = {"unet": malloc.kept, "vae": malloc.returned} if plan["malloc_tuning"] else {}
    return rules.get(component, contextlib.nullcontext)()


@contextlib.contextmanager
def summing(component: str, network: nn.Module, plan: Plan) -> Iterator[None]:
    """Has the UNet's sums made as the plan wants them, by weights as they are now, for as long as the block lasts."""
    if component != "unet" or plan["residual_fusion"] == "off" or not isinstance(network, Model):
        yield
        return
    copies = unet_rows(plan.workload, plan) if plan["residual_fusion"] == "with weight copies" else None
    network.lay_sums(copies)
    try:
        yield
    finally:
        network.drop_sums()


def prepare(network: nn.Module, plan: Plan) -> None:
    """Gives weights that are about to work their layout and their place, and joins those that the plan wants multiplied
    at once; nothing to do the second time, unless they were moved.
    """
    wanted = plan.memory_format, bool(plan["packed_projections"])
    if isinstance(network, Model) and network.prepared == (wanted, places(network)):
        return
    layout(network, plan.memory_format)
    align(network)
    if isinstance(network, Model):
        if plan["packed_projections"]:
            network.lay_together()
        network.prepared = wanted, places(network)


def fetch(network: nn.Module, draft: Draft) -> bool:
    """Reads a network's weights, if they are not in memory, onto the CPU; whether it did."""
    if not is_empty(network):
        return False
    dtype = next(network.parameters()).dtype
    draft.refill(network, device=CPU, dtype=dtype, memory_format=torch.contiguous_format)
    return True


@contextlib.contextmanager
def whole(network: nn.Module, draft: Draft | None) -> Iterator[None]:
    """Has a network whose weights were dropped back in memory for as long as the block lasts."""
    fetched = draft is not None and fetch(network, draft)
    try:
        yield
    finally:
        if fetched:
            network.to(META)


@contextlib.contextmanager
def streamed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves each layer's own parameters to the device just before it computes, and drops them right after."""
    home: dict[nn.Module, dict[str, nn.Parameter]] = {}

    def arrive(layer: nn.Module, args: Any) -> None:
        home[layer] = dict(own_parameters(layer))
        for name, parameter in home[layer].items():
            layer._parameters[name] = nn.Parameter(parameter.to(device), requires_grad=False)

    def leave(layer: nn.Module, args: Any, output: Any) -> None:
        layer._parameters.update(home.pop(layer))

    def receive(network: nn.Module, args: Any) -> Any:  # callers send their inputs to where the weights rest
        return tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args)

    layers = [layer for layer in module.modules() if own_parameters(layer)]
    buffers = [(owner, name, b) for owner in module.modules() for name, b in owner._buffers.items() if b is not None]
    hooks = [
        hook
        for layer in layers
        for hook in (layer.register_forward_pre_hook(arrive), layer.register_forward_hook(leave))
    ]
    hooks.append(module.register_forward_pre_hook(receive))
    try:
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer.to(device)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, parameters in home.items():  # layers that an error left in the middle of their work
            layer._parameters.update(parameters)
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a layer holds itself, those of its children left out."""
    return {name: p for name, p in layer._parameters.items() if p is not None}
