"""What the tensor names of a LoRA say: which layer each changes, by which method, at which rank, for which model.

Several tools write such files, each with its own names: kohya's scripts and LyCORIS (dots turned to underscores, after
``lora_unet_`` or ``lora_te_``), PEFT (``….lora_A.weight``), and Diffusers before it used PEFT (``….lora.down.weight``,
``….processor.to_q_lora.down.weight``). All come down to (network, layer, role).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

Shapes = Mapping[str, tuple[int, ...]]

NETWORKS = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "diffusion_model.": "unet",
    "base_model.model.": "unet",
}
DOWN, UP = ("lora_down", "lora_A", "down"), ("lora_up", "lora_B", "up")
ROLE = re.compile(
    r"(?P<layer>.+?)(?:_lora|\.lora|\.lora_linear_layer)?"
    r"\.(?P<role>lora_(?:down|up|mid|A|B)|down|up|alpha|dora_scale|lora_magnitude_vector"
    r"|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|oft_(?:blocks|diag))(?:\.(?!weight)\w+)?(?:\.weight)?"
)
METHODS = {  # the role that shows the method, the rarer first
    "LoKr": r"lokr_.+",
    "LoHa": r"hada_.+",
    "OFT": r"oft_.+",
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoCon": r"lora_mid",
    "LoRA": r"lora_(down|up|A|B)|down|up",
}
CONTEXT_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}  # of the text that a UNet reads
TEXT_WIDTHS = {768: "sd1", 1024: "sd2"}  # of a text encoder that is the only one


class Change(NamedTuple):
    """One tensor of a LoRA: the network and the layer that it changes (dots as underscores), and what it is there."""

    network: str
    layer: str
    role: str
    shape: tuple[int, ...]


def changes(shapes: Shapes) -> tuple[list[Change], list[str]]:
    """What each tensor changes, and the names that say nothing of the kind."""
    known, unknown = [], []
    for key, shape in shapes.items():
        head = next((head for head in NETWORKS if key.startswith(head)), "")
        match = ROLE.fullmatch(key[len(head) :])
        if head and match:
            layer = match["layer"].replace(".processor", "").replace(".", "_")
            layer = f"{layer}_0" if layer.endswith("_to_out") else layer  # Diffusers' old names leave the 0 out
            known.append(Change(NETWORKS[head], layer, match["role"], shape))
        else:
            unknown.append(key)
    return known, unknown


def method(found: list[Change]) -> str:
    """LoRA, or its relative: with convolutions (LoCon), Hadamard (LoHa), Kronecker (LoKr), magnitudes (DoRA), OFT.

    Empty where the tensors are no LoRA at all.
    """
    roles = {change.role for change in found}
    name = next((name for name, mark in METHODS.items() if any(re.fullmatch(mark, role) for role in roles)), "")
    convolves = any(len(c.shape) == 4 and c.shape[-1] > 1 for c in found if c.role in DOWN)
    return "LoCon" if name == "LoRA" and convolves else name


def layout(shapes: Shapes) -> str:
    """Whose names a LoRA uses."""
    if any(key.startswith("lora_") for key in shapes):
        return "kohya"
    return "PEFT" if any(".lora_A." in key for key in shapes) else "Diffusers"


def ranks(found: list[Change]) -> tuple[int, ...]:
    """The inner sizes in use, ascending: one number for most files."""
    inward = (*DOWN, "hada_w1_b", "hada_w2_b", "lokr_w1_b", "lokr_w2_b")
    return tuple(sorted({change.shape[0] for change in found if change.role in inward and change.shape}))


def family(found: list[Change]) -> str:
    """The family that a LoRA was made for: by the width of the text features that cross-attention reads, else by the
    networks and blocks that it names; empty where that does not tell.
    """
    if any(change.network == "text_encoder_2" for change in found):
        return "sdxl"
    if widths := set(input_widths(found, "unet", r".+_attn2_to_[kv]")) & set(CONTEXT_WIDTHS):
        return CONTEXT_WIDTHS[max(widths)]
    if any(change.network == "unet" and re.match(r"(input|output)_blocks_", change.layer) for change in found):
        return "sdxl"  # kohya's scripts use these names for XL alone
    widths = set(input_widths(found, "text_encoder", r".+_self_attn_(q|to_q)(_proj)?"))
    return next((TEXT_WIDTHS[width] for width in sorted(widths) if width in TEXT_WIDTHS), "")


def input_widths(found: list[Change], network: str, layers: str) -> Iterator[int]:
    """How many features enter the layers that match."""
    inward = (*DOWN, "hada_w1_b")
    for change in found:
        if change.network == network and re.fullmatch(layers, change.layer) and change.role in inward:
            yield from change.shape[1:2]
