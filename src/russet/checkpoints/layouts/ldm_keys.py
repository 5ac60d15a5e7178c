"""Where each tensor of our models lies in a single file, in the layout of the LDM and SGM code bases.

Our parameter names are those of Diffusers checkpoints; the authors' own files number blocks through and name layers
otherwise. One function per network says, for one of our names, where the file keeps that tensor: a ``Place``. The map
of a whole model comes from asking for every name of the model, so block counts and depths follow from its config, and
reading and writing cannot disagree.

The layouts: openaimodel.py and model.py of CompVis/stable-diffusion and Stability-AI/generative-models, and the text
tower of OpenCLIP.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from russet.checkpoints.formats.tensor_source import ITEM_SIZES, StoredTensor, row_major

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Place:
    """The file's key for one of our tensors, and how the file holds it.

    ``third`` 0, 1 or 2: the file stacks the query, key and value weights along the first axis, and this is that third.
    ``transposed``: the file holds the matrix as [in, out]. ``conv``: the file holds the matrix as a 1×1 convolution.
    """

    key: str
    third: int | None = None
    transposed: bool = False
    conv: bool = False

    def cut(self, stored: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
        """Our tensor of ``shape`` as a part of the file's, of which no other byte is read.

        A matrix and a 1×1 convolution are the same numbers, and files have either where our models have the other.
        What does not fit ``shape`` is left as it is, to be reported.
        """
        sizes, strides, offset = stored.shape, stored.strides or row_major(stored.shape), stored.offset
        if self.third is not None and sizes and sizes[0] % 3 == 0:
            rows = sizes[0] // 3
            offset += self.third * rows * strides[0] * ITEM_SIZES[stored.dtype]
            sizes = (rows, *sizes[1:])
        if self.transposed and len(sizes) == 2:
            sizes, strides = sizes[::-1], strides[::-1]
        if len(shape) > 1 and sizes != shape and (*sizes, 1, 1)[:4] == (*shape, 1, 1)[:4]:
            sizes, strides = shape, (*strides, 1, 1)[: len(shape)]
        packed = strides == row_major(sizes)
        return dataclasses.replace(stored, offset=offset, shape=sizes, strides=None if packed else strides)

    def put(self, value: torch.Tensor) -> torch.Tensor:
        """The file's tensor, or its third, from the model's."""
        if self.conv:
            value = value[:, :, None, None]
        return value.t() if self.transposed else value


Translate = Callable[[str, Mapping[str, Any]], Place]
"""(one of our names, the model's config) -> its place."""


def places(names: Iterable[str], translate: Translate, config: Mapping[str, Any]) -> dict[str, Place]:
    """The place of each of a model's tensors: the whole map of one network."""
    return {name: translate(name, config) for name in names}


# ---------------------------------------------------------------------------------------------------------------- UNet

UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<level>\d+)|mid_block)\.(?P<part>\w+)\.(?P<index>\d+)\.(?P<rest>.+)"
)


def unet(name: str, config: Mapping[str, Any]) -> Place:
    """A UNet tensor: blocks are numbered through over all levels, a level's resampler counting as one more block."""
    if not (match := BLOCK.fullmatch(name)):
        return Place(renamed(name, UNET_ENDS))
    part, index, rest = match["part"], int(match["index"]), match["rest"]
    if part == "resnets":
        rest = renamed(rest, UNET_RESNET)
    elif part == "downsamplers":
        rest = rest.replace("conv.", "op.", 1)
    if match["side"] is None:
        return Place(f"middle_block.{1 if part == 'attentions' else 2 * index}.{rest}")
    level = int(match["level"])
    side, block, slot = unet_block(match["side"], level, part, index, config)
    return Place(f"{side}.{block}.{slot}.{rest}")


def unet_block(side: str, level: int, part: str, index: int, config: Mapping[str, Any]) -> tuple[str, int, int]:
    """The list (``input_blocks`` or ``output_blocks``), the block's number in it, and the slot in the block."""
    down = side == "down"
    layers = config["layers_per_block"]
    layers = [layers] * len(config["block_out_channels"]) if isinstance(layers, int) else list(layers)
    layers = layers if down else [count + 1 for count in reversed(layers)]
    index = index if part in ("resnets", "attentions") else layers[level]
    if down:  # after conv_in, and each level with its downsampler
        return "input_blocks", 1 + sum(layers[:level]) + level + index, int(part == "attentions")
    attends = "CrossAttn" in config["up_block_types"][level]
    if part == "upsamplers":  # in the level's last block, behind what else is there
        return "output_blocks", sum(layers[: level + 1]) - 1, 1 + attends
    return "output_blocks", sum(layers[:level]) + index, int(part == "attentions")


# ----------------------------------------------------------------------------------------------------------------- VAE

VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_LEVEL = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)")


def vae(name: str, config: Mapping[str, Any]) -> Place:
    """A VAE tensor: the decoder's levels are counted from the finest, and attention is made of 1×1 convolutions."""
    if match := VAE_LEVEL.fullmatch(name):
        side, level, part, index, rest = match[1], int(match[2]), match[3], match[4], match[5]
        stack = "down" if side == "encoder" else "up"
        level = level if side == "encoder" else len(config["block_out_channels"]) - 1 - level
        inner = f"block.{index}" if part == "resnets" else f"{stack}sample"
        return Place(f"{side}.{stack}.{level}.{inner}.{rest.replace('conv_shortcut', 'nin_shortcut')}")
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        side, part, number, rest = match[1], match[2], int(match[3]) + 1, match[4]
        if part == "resnets":
            return Place(f"{side}.mid.block_{number}.{rest.replace('conv_shortcut', 'nin_shortcut')}")
        conv = rest.endswith(".weight") and not rest.startswith("group_norm")
        return Place(f"{side}.mid.attn_{number}.{renamed(rest, VAE_ATTENTION)}", conv=conv)
    return Place(name.replace(".conv_norm_out.", ".norm_out."))


# -------------------------------------------------------------------------------------------------------- text encoders

OPENCLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def clip(name: str, config: Mapping[str, Any]) -> Place:
    """A tensor of OpenAI's text encoder, which LDM took from transformers, names and all, under one more prefix."""
    return Place(name.removeprefix("text_model."))


def openclip(name: str, config: Mapping[str, Any]) -> Place:
    """A tensor of OpenCLIP's text tower: q, k and v stacked as ``in_proj``, the text projection transposed."""
    if name == "text_projection.weight":
        return Place("text_projection", transposed=True)
    if name == "text_model.embeddings.position_embedding.weight":
        return Place("positional_embedding")
    if not (match := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", name)):
        return Place(renamed(name, OPENCLIP))
    block, rest = f"transformer.resblocks.{match[1]}", match[2]
    if stacked := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest):
        return Place(f"{block}.attn.in_proj_{stacked[2]}", third="qkv".index(stacked[1]))
    return Place(f"{block}.{renamed(rest, OPENCLIP_LAYER)}")


def renamed(name: str, table: Mapping[str, str]) -> str:
    """``name`` with the module that it begins with renamed by ``table``; as it is where the table has none."""
    module, _, tensor = name.rpartition(".")
    return f"{table.get(module, module)}.{tensor}"


# ---------------------------------------------------------------------------------------------- the files as a whole


@dataclasses.dataclass(frozen=True)
class LdmNetwork:
    """One network in a single file: the component it becomes, the prefixes it is seen under, how names translate.

    The first prefix is the one that is written.
    """

    component: str
    prefixes: tuple[str, ...]
    translate: Translate

    def skipped_blocks(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """What the file's names of layers begin with that the model does not have on purpose: SD2 takes the text
        features before OpenCLIP's last layer, which its files keep and its configs leave out.
        """
        return (f"transformer.resblocks.{config['num_hidden_layers']}.",) if self.translate is openclip else ()


CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
UNET = LdmNetwork("unet", ("model.diffusion_model.", "diffusion_model."), unet)
VAE = LdmNetwork("vae", ("first_stage_model.", "vae."), vae)
LAYOUTS: Mapping[str, tuple[LdmNetwork, ...]] = {
    "sd1": (
        UNET,
        VAE,
        LdmNetwork("text_encoder", ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."), clip),
    ),
    "sd2": (UNET, VAE, LdmNetwork("text_encoder", ("cond_stage_model.model.",), openclip)),
    "sdxl": (
        UNET,
        VAE,
        LdmNetwork(
            "text_encoder",
            ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.0.transformer."),
            clip,
        ),
        LdmNetwork("text_encoder_2", ("conditioner.embedders.1.model.",), openclip),
    ),
    "sdxl-refiner": (UNET, VAE, LdmNetwork("text_encoder_2", ("conditioner.embedders.0.model.",), openclip)),
}
"""The networks of a file by family: the kinds ``sd1-inpaint``, ``sd2-v`` … have the layout of their family."""

EMA = "model_ema."


def ema_key(key: str) -> str:
    """Where the averaged copy of a UNet tensor lies, given its key without prefix: dots are taken out of the name."""
    return EMA + "diffusion_model" + key.replace(".", "")


IGNORED = re.compile(
    # training state and noise schedules, which the scheduler's config says
    r"(log_one_minus_|sqrt_|sqrt_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(_prev)?"
    r"|betas|posterior_\w+|log(var|_one_minus)\w*|lvlb_weights|scale_factor|global_step|epoch|denoiser\.\w*sigmas"
    r"|(first_stage_model\.|vae\.)?(loss|model_ema)\..+"
    # markers of the prediction type
    r"|v_pred|ztsnr"
    # parts of CLIP that no picture depends on: counters, contrastive heads, vision towers
    r"|(.+\.)?(position_ids|logit_scale|attn_mask)"
    r"|cond_stage_model\.(transformer\.|model\.)?(vision_model|visual|visual_projection)\..+"
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.(transformer\.|model\.)?text_projection(\.weight)?"
)


def ignored(key: str) -> bool:
    """Whether a file's key is known and not needed to make pictures."""
    return IGNORED.fullmatch(key) is not None


def unknown_keys(keys: Iterable[str]) -> list[str]:
    """The keys that belong to no network and are not known to be unneeded."""
    prefixes = tuple({prefix for parts in LAYOUTS.values() for part in parts for prefix in part.prefixes})
    return [key for key in keys if not key.startswith(prefixes) and not ignored(key)]
