"""What a weight file is, by the names and shapes of its tensors alone.

A single file carries no class names: whether it is Stable Diffusion 1, 2 or XL, for inpainting, a LoRA or a VAE shows
in which tensors it has and how wide they are. ``recognise`` names everything that people commonly have on disk, also
what Russet cannot load, so that an error can say what the file is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from russet.checkpoints.layouts import lora_names
from russet.checkpoints.layouts.lora_names import CONTEXT_WIDTHS, Shapes

FAMILIES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sdxl-refiner": "Stable Diffusion XL refiner",
}
TASKS = {
    "inpaint": "inpainting",
    "pix2pix": "instruct-pix2pix",
    "depth": "depth to image",
    "upscale": "upscaling",
    "unclip": "image variations (unCLIP)",
}
FORMS = {
    "checkpoint": "checkpoint",
    "unet": "UNet alone",
    "vae": "VAE alone",
    "text_encoder": "text encoder alone",
    "controlnet": "ControlNet",
    "lora": "LoRA",
    "embedding": "textual inversion",
    "other": "not a Stable Diffusion model",
}

INPUT_CHANNELS = {9: "inpaint", 8: "pix2pix", 5: "depth", 7: "upscale"}


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    ``form``: a key of FORMS. ``family``: a key of FAMILIES, "" where it is not known. ``task``: a key of TASKS, or ""
    for text to image. ``layout``: whose tensor names the file uses. ``detail``: what else there is to say in words.
    """

    form: str
    family: str = ""
    task: str = ""
    layout: str = ""
    detail: str = ""

    def __str__(self) -> str:
        words = [FAMILIES.get(self.family, ""), TASKS.get(self.task, ""), self.detail or FORMS[self.form]]
        layout = f" ({self.layout} layout)" if self.layout else ""
        return ", ".join(word for word in words if word) + layout


def recognise(shapes: Shapes) -> FileKind:
    """The kind of file that has tensors of these names and shapes."""
    for rule in (lora, controlnet, checkpoint, single_network, embedding):
        if kind := rule(shapes):
            return kind
    return foreign(shapes)


# ---------------------------------------------------------------------------------------------------------- checkpoints

UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
ATTENTION = ".transformer_blocks.0.attn2.to_k.weight"
TEXT_FAMILIES = {
    "cond_stage_model.transformer.": "sd1",
    "cond_stage_model.model.": "sd2",
    "conditioner.embedders.1.": "sdxl",
    "conditioner.embedders.0.model.": "sdxl-refiner",
}


def checkpoint(shapes: Shapes) -> FileKind | None:
    """A whole model in the layout of LDM or SGM, or its UNet alone, with or without prefix."""
    for prefix in UNET_PREFIXES:
        if (first := shapes.get(prefix + "input_blocks.0.0.weight")) is not None:
            break
    else:
        return None
    found = [family for mark, family in TEXT_FAMILIES.items() if any(key.startswith(mark) for key in shapes)]
    whole = bool(found) or any(key.startswith("first_stage_model.") for key in shapes)
    family = found[-1] if found else context_family(shapes)
    task = INPUT_CHANNELS.get(first[1] if len(first) > 1 else 0, "")
    if family == "sd2" and not task and prefix + "label_emb.0.0.weight" in shapes:
        task = "unclip"
    # The sigmas of an EDM model (Playground v2.5, CosXL) do not belong to the noise schedule of the kinds known here.
    edm = any(key.startswith("edm_") for key in shapes)
    return FileKind("checkpoint" if whole else "unet", family, task, "LDM", "EDM checkpoint" if edm else "")


def context_family(shapes: Shapes) -> str:
    """The family, by the width of the text features that cross-attention reads."""
    widths = (shape[-1] for key, shape in shapes.items() if key.endswith(ATTENTION) and shape)
    return CONTEXT_WIDTHS.get(next(widths, 0), "")


# ----------------------------------------------------------------------------------------------------- single networks


def single_network(shapes: Shapes) -> FileKind | None:
    """One component alone, as in a Diffusers folder or cut out of a single file."""
    if "time_embedding.linear_1.weight" in shapes and "conv_in.weight" in shapes:
        first = shapes["conv_in.weight"]
        task = INPUT_CHANNELS.get(first[1] if len(first) > 1 else 0, "")
        return FileKind("unet", context_family(shapes), task, "Diffusers")
    if any(re.match(r"(first_stage_model\.|vae\.)?decoder\.mid\.block_1\.", key) for key in shapes):
        return FileKind("vae", layout="LDM")
    if any(key.startswith("decoder.mid_block.resnets.0.") for key in shapes):
        return FileKind("vae", layout="Diffusers")
    if any(re.match(r"(text_model\.)?encoder\.layers\.0\.self_attn\.", key) for key in shapes):
        return FileKind("text_encoder", layout="Diffusers")
    if "transformer.resblocks.0.attn.in_proj_weight" in shapes:
        return FileKind("text_encoder", layout="OpenCLIP")
    return None


# ---------------------------------------------------------------------------------------------- LoRA and other adapters

CONTROLNETS = {
    "control_model.": "LDM",
    "input_hint_block.": "LDM",
    "controlnet_cond_embedding.": "Diffusers",
}


def lora(shapes: Shapes) -> FileKind | None:
    """Low-rank changes to another model, by whichever method."""
    found, _ = lora_names.changes(shapes)
    if not (method := lora_names.method(found)):
        return None
    return FileKind("lora", lora_names.family(found), "", lora_names.layout(shapes), method)


def controlnet(shapes: Shapes) -> FileKind | None:
    """A ControlNet, in either layout."""
    for mark, layout in CONTROLNETS.items():
        if any(key.startswith(mark) for key in shapes):
            return FileKind("controlnet", context_family(shapes), "", layout)
    return None


# --------------------------------------------------------------------------------------------------- textual inversion


def embedding(shapes: Shapes) -> FileKind | None:
    """New words for the text encoder: one short matrix [tokens, width] for each encoder."""
    if set(shapes) == {"clip_l", "clip_g"}:
        return FileKind("embedding", "sdxl", layout="kohya")
    words = {key: shape for key, shape in shapes.items() if 0 < len(shape) <= 2 and shape[-1] in CONTEXT_WIDTHS}
    if not words or len(words) != len(shapes) or len(shapes) > 8:
        return None
    width = next(iter(words.values()))[-1]
    family = {768: "sd1", 1024: "sd2", 1280: "sdxl"}.get(width, "")
    layout = "A1111" if any(key == "emb_params" or key.startswith("string_to_param") for key in words) else "Diffusers"
    return FileKind("embedding", family, layout=layout)


# ---------------------------------------------------------------------------------------------------- everything else

FOREIGN = {
    "Stable Diffusion 3": r"(model\.diffusion_model\.)?joint_blocks\.",
    "Flux": r"(model\.diffusion_model\.)?double_blocks\.",
    "IP-Adapter": r"(image_proj|ip_adapter)\.",
    "T2I-Adapter": r"(adapter\.)?body\.0\.block1\.",
    "AnimateDiff motion module": r".*motion_modules?\.",
    "CLIP vision tower": r"vision_model\.",
    "safety checker": r"concept_embeds$",
    "tiny VAE (TAESD)": r"(taesd_)?(decoder\.|encoder\.)?(layers\.)?\d+\.conv\.0\.weight$",
    "upscaler (ESRGAN)": r"(model\.1\.sub\.|body\.0\.rdb1\.|RRDB_trunk\.)",
}


def foreign(shapes: Shapes) -> FileKind:
    """Anything else, by name where it is well known."""
    for title, mark in FOREIGN.items():
        if any(re.match(mark, key) for key in shapes):
            return FileKind("other", detail=title)
    return FileKind("other", detail="unknown kind of file")
