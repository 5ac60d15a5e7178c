"""A pipeline written as one file with the tensor names of its authors' code, as other programs read it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from russet.checkpoints.atomic_directory import atomic_directory
from russet.checkpoints.formats.writing import write_safetensors
from russet.checkpoints.layouts.ldm_keys import LAYOUTS, LdmNetwork, Place
from russet.errors import ArgumentTypeError, InputError

ARCHITECTURES = {  # as the metadata standard for models names them (github.com/Stability-AI/ModelSpec)
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
}


def save_single_file(components: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the UNet, VAE and text encoders of a pipeline to one .safetensors file, in the precision that they have.

    What the model predicts goes into the file's metadata, and into the marker tensors that other programs look for.
    A Stable Diffusion 2 file is written without the last layer of its text encoder, which no picture depends on.

    Args:
        components: ``pipe.components``.

    Raises:
        ArgumentTypeError, InputError: no path of a .safetensors file, or a component that is missing.
        CheckpointError: it cannot be written; a file that stood there before is intact.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise ArgumentTypeError(f"a file to save must be a text or a path, not {path!r}")
    goal = Path(path).expanduser()
    if goal.suffix != ".safetensors":
        raise InputError(f"the file's name must end in .safetensors, not {goal.name!r}")
    family = family_of(components)
    config = getattr(components.get("scheduler"), "config", {})
    tensors: dict[str, torch.Tensor] = dict(markers(family, config))
    for part in LAYOUTS[family]:
        tensors |= gathered(part, components[part.component])
    nbytes = sum(value.numel() * value.element_size() for value in tensors.values())
    with atomic_directory(goal.parent, nbytes) as temporary:
        write_safetensors(temporary / goal.name, tensors, metadata(family, config, goal.stem))


def family_of(components: Mapping[str, Any]) -> str:
    """The family whose layout a pipeline's components have.

    Raises:
        InputError: one of them is missing.
    """
    texts = [name for name in ("text_encoder", "text_encoder_2") if components.get(name) is not None]
    if missing := [name for name in ("unet", "vae") if components.get(name) is None]:
        raise InputError(f"a single file needs {' and '.join(missing)}")
    if not texts:
        raise InputError("a single file needs a text_encoder")
    if "text_encoder_2" in texts:
        return "sdxl" if "text_encoder" in texts else "sdxl-refiner"
    # Stable Diffusion 2 took OpenCLIP's encoder, which computes GELU exactly; OpenAI's approximates it.
    return "sd1" if components["text_encoder"].config["hidden_act"] == "quick_gelu" else "sd2"


def gathered(part: LdmNetwork, model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of one network as the file has them."""
    pieces: dict[str, list[tuple[Place, torch.Tensor]]] = {}
    for name, value in model.state_dict().items():
        place = part.translate(name, model.config)  # type: ignore[arg-type]
        pieces.setdefault(part.prefixes[0] + place.key, []).append((place, value))
    return {
        key: found[0][0].put(found[0][1])
        if len(found) == 1
        else torch.cat([value for _, value in sorted_thirds(found)])
        for key, found in pieces.items()
    }


def sorted_thirds(found: list[tuple[Place, torch.Tensor]]) -> list[tuple[Place, torch.Tensor]]:
    return sorted(found, key=lambda item: item[0].third or 0)


def markers(family: str, scheduler: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Empty tensors that tell other programs what a model predicts where its family usually does otherwise."""
    if family != "sd2" and scheduler.get("prediction_type") == "v_prediction":
        yield "v_pred", torch.empty(0, device="cpu")
    if scheduler.get("rescale_betas_zero_snr"):
        yield "ztsnr", torch.empty(0, device="cpu")


def metadata(family: str, scheduler: Mapping[str, Any], title: str) -> dict[str, str]:
    """What the file's header says of the model."""
    velocity = scheduler.get("prediction_type") == "v_prediction"
    architecture = "stable-diffusion-v2-768-v" if family == "sd2" and velocity else ARCHITECTURES[family]
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if velocity else "epsilon",
    }
