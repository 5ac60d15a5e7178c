"""What a model's output means, where the weights cannot say: noise (epsilon) or velocity (v_prediction).

Stable Diffusion 2 was published both ways with the same tensors, and fine-tunes of any family may use either. A wrong
choice gives noise instead of pictures, so the evidence is weighed in one order and named: the caller, a YAML file
beside the weights, marker tensors, the metadata in the file's header, and the names of the published files. Where there
is none, the UNet is probed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from russet.checkpoints.layouts.detection import FileKind
from russet.errors import CorruptFile, InputError, MissingFile

Meaning = Literal["epsilon", "v_prediction"]
SPELLINGS: Mapping[str, Meaning] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}
PUBLISHED: Mapping[str, Meaning] = {  # how Stability AI named its files
    r"768-v-|v2-1_768": "v_prediction",
    r"512-base-|v2-1_512|512-inpainting-|512-depth-|sd_turbo": "epsilon",
}
ARCHITECTURES: Mapping[str, Meaning] = {"-v2-768-v": "v_prediction", "-v2-512": "epsilon"}  # of modelspec metadata
SIDECAR_LIMIT = 16 << 10  # bytes; the published YAML configs have 2 to 4 kB

LAST_TIMESTEP = 999
PROBE_SIZE = 8  # latents per side: enough values to distinguish a similarity of 0 from 1, few enough to take seconds


@dataclass(frozen=True)
class Prediction:
    """``meaning``: None where nothing tells. ``zero_snr``: the schedule ends in pure noise. ``why``: the evidence."""

    meaning: Meaning | None
    zero_snr: bool
    why: str


def decide_prediction(
    kind: FileKind,
    *,
    requested: str | None = None,
    sidecar: Mapping[str, Any] | None = None,
    names: Collection[str] = (),
    metadata: Mapping[str, str] | None = None,
    stem: str = "",
) -> Prediction:
    """Weighs the evidence.

    Args:
        requested: what the caller says.
        sidecar: the YAML file beside the weights, or the one that the caller gives.
        names: the file's tensors.
        metadata: of the file's header.
        stem: the file's name.

    Raises:
        InputError: ``requested`` is none of the known meanings.
    """
    metadata = metadata or {}
    zero_snr = "ztsnr" in names
    if requested is not None:
        if requested not in ("epsilon", "v_prediction"):
            raise InputError(f"prediction_type must be 'epsilon' or 'v_prediction', not {requested!r}")
        return Prediction(SPELLINGS[requested], zero_snr, "the caller says so")
    if meaning := sidecar_meaning(sidecar or {}):
        return Prediction(meaning, zero_snr, "the YAML config beside it says so")
    if "v_pred" in names:
        return Prediction("v_prediction", zero_snr, "it has the marker tensor v_pred")
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if meaning := SPELLINGS.get(metadata.get(key, "")):
            return Prediction(meaning, zero_snr, f"its metadata has {key}")
    for mark, meaning in ARCHITECTURES.items():
        if mark in metadata.get("modelspec.architecture", ""):
            return Prediction(meaning, zero_snr, "its metadata names the architecture")
    for mark, meaning in PUBLISHED.items():
        if kind.family == "sd2" and re.search(mark, stem):
            return Prediction(meaning, zero_snr, "it has the name of a published file")
    if kind.family == "sd2" and not kind.task:
        return Prediction(None, zero_snr, "nothing in the file or beside it tells")
    return Prediction("epsilon", zero_snr, "the published model has it")


def sidecar_meaning(sidecar: Mapping[str, Any]) -> Meaning | None:
    """The meaning in a config of LDM (``parameterization``) or SGM (the class of the denoiser's scaling)."""
    params = inside(sidecar, "model", "params")
    if meaning := SPELLINGS.get(str(params.get("parameterization"))):
        return meaning
    target = inside(params, "denoiser_config", "params", "scaling_config").get("target")
    if isinstance(target, str):
        return "v_prediction" if target.endswith(".VScaling") else "epsilon" if target.endswith(".EpsScaling") else None
    return "epsilon" if "unet_config" in params else None  # LDM's default, which its SD1 and SD2-base files rely on


def inside(data: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping that lies under ``keys``; empty where there is none."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def read_sidecar(path: Path) -> Mapping[str, Any]:
    """A YAML config of LDM or SGM, as mappings, lists and texts: nothing else is made from it, numbers included.

    Raises:
        MissingFile: it is not there or may not be read.
        CorruptFile: it is no YAML mapping, or too long to be such a config.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        with path.open("rb") as file:
            raw = file.read(SIDECAR_LIMIT + 1)
    except OSError as error:
        raise MissingFile(f"{path} cannot be read: {error.strerror or error}") from None
    if len(raw) > SIDECAR_LIMIT:
        raise CorruptFile(f"{path} has more than {SIDECAR_LIMIT} bytes: too many for a config")
    try:
        data = yaml.load(raw, Loader=yaml.BaseLoader)  # safer than SafeLoader: no merging of keys, which can explode
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CorruptFile(f"{path} is not YAML that can be read: {str(error)[:300]}") from None
    if not isinstance(data, Mapping):
        raise CorruptFile(f"{path} must hold a mapping, not {type(data).__name__}")
    return data


@torch.no_grad()
def probe_prediction(unet: Any) -> Meaning | None:
    """What a UNet predicts, from its output for almost pure noise: x = alpha x0 + sigma eps with alpha = 0.07, at the
    last timestep. A network that predicts noise returns nearly its input; one that predicts velocity,
    v = alpha eps - sigma x0, returns nearly the opposite of a picture, which has little similarity with it.

    None if the output is neither, or the machine cannot compute in the network's precision.
    """
    generator = torch.Generator().manual_seed(0)
    size = (1, unet.config.in_channels, PROBE_SIZE, PROBE_SIZE)
    noise = torch.randn(*size, generator=generator, device="cpu").to(unet.dtype)
    context = torch.zeros(1, 1, unet.config.cross_attention_dim, dtype=unet.dtype, device="cpu")
    try:
        output = unet(noise, LAST_TIMESTEP, context).sample
    except RuntimeError:  # older torch lacks half precision on the CPU
        return None
    similarity = float(torch.nn.functional.cosine_similarity(output.flatten().float(), noise.flatten().float(), dim=0))
    return "epsilon" if similarity > 0.7 else "v_prediction" if abs(similarity) < 0.3 else None
