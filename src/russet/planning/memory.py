"""Peak memory of a call, predicted from shapes before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from russet.hardware.facts import Facts
from russet.passes import PASSES
from russet.passes.base import Situation
from russet.planning.activations import Arithmetic, decoder_peak, encoder_peak, tower_peak, unet_peak
from russet.planning.calls import tile_latents, unet_rows
from russet.planning.parameters import counts, largest_layers
from russet.planning.plan_types import TEXT, AttentionChoice, Decisions, Request
from russet.planning.workload import TransformerSizes, UNetSizes, VAESizes, Workload

__all__ = ["Estimate", "TransformerSizes", "UNetSizes", "VAESizes", "Workload", "predict", "resident"]

CUDA_LIBRARIES = 2**26  # bytes that cuBLAS keeps to work in, measured on an H200 by benchmarks/memory.py
OWNER = {"text": "text_encoder", "encode": "vae", "denoise": "unet", "decode": "vae", "check": "safety_checker"}


@dataclass(frozen=True)
class Phase:
    """What one phase holds at its peak: parameters, activations, and what is kept meanwhile (latents, pictures)."""

    name: str
    parameters: int
    activations: int
    kept: int

    @property
    def peak(self) -> int:
        return self.parameters + self.activations + self.kept


@dataclass(frozen=True)
class Estimate:
    """Predicted bytes by phase: ``text``, ``denoise``, ``decode`` and, where they occur, ``encode`` and ``check``."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)

    def __getitem__(self, name: str) -> Phase:
        return {phase.name: phase for phase in self.phases}[name]


def predict(facts: Facts, workload: Workload, request: Request, found: Decisions) -> Estimate:
    """The estimate for one way of doing the work."""
    footprints = {one.name: one.footprint(Situation(facts, workload, request, found)) for one in PASSES}
    needs = phase_activations(workload, found, {k: v for one in footprints.values() for k, v in one.walk.items()})
    weights = resident(workload, found, tuple(needs))
    kept = latent_bytes(workload) + (CUDA_LIBRARIES if on_cuda(found) else 0)
    pictures = workload.images * 3 * workload.width * workload.height * 4
    recorded = footprints["cuda_graphs"].kept if "cuda_graphs" in footprints else 0  # it stays after the run
    beside = {"encode": 2 * pictures, "decode": pictures + recorded, "check": 2 * pictures}
    beside["denoise"] = sum(one.kept for one in footprints.values())
    needs["decode"] = max(needs["decode"], pictures)  # those of all parts are joined when the last part is done
    return Estimate(
        tuple(Phase(name, weights[name], needed, kept + beside.get(name, 0)) for name, needed in needs.items())
    )


def on_cuda(found: Decisions) -> bool:
    """Whether the device has memory of its own."""
    return bool(found["offload_target"] == "cpu")


def phase_activations(workload: Workload, found: Decisions, walk: Mapping[str, Any]) -> dict[str, int]:
    """Peak activation bytes of each phase, in the order they happen; ``walk`` is what passes say of ``Arithmetic``."""

    def how(component: str) -> Arithmetic:
        attention = AttentionChoice() if component == "safety_checker" else found.attention(component)
        return Arithmetic(
            width=found.width(component),
            attention=attention,
            composed=found["group_norm"] == "composed",
            reordered=reordered(found),
            **walk,
        )

    needs = {}
    vae = min(found.vae_batch, workload.images), tile_latents(workload, found), how("vae")
    if workload.text:
        rows = workload.rows * workload.images
        needs["text"] = max(tower_peak(tower, rows, how("text_encoder")) for tower in workload.text)
    if workload.encodes:
        needs["encode"] = encoder_peak(workload.vae, *vae)
    needs["denoise"] = unet_peak(workload.unet, unet_rows(workload, found), workload.latents, how("unet"))
    needs["denoise"] += deep_map_bytes(workload, found)
    needs["decode"] = decoder_peak(workload.vae, *vae)
    if workload.vision:
        needs["check"] = tower_peak(workload.vision, workload.images, how("safety_checker"))
    return needs


def reordered(found: Decisions) -> bool:
    """Whether channels-last maps meet CUDA's GroupNorm, which works channel by channel, and not the fused one."""
    plain = found["ops"] == "eager" or found.offload == "sequential"  # layers that come and go are not fused
    return on_cuda(found) and plain and found.memory_format == "channels_last"


def resident(workload: Workload, found: Decisions, phases: Iterable[str]) -> dict[str, int]:
    """Bytes of parameters that count against the device's memory in each phase."""
    weights = {name: count * found.width(name) for name, count in counts(workload).items()}
    layers = {name: count * found.width(name) for name, count in largest_layers(workload).items()}
    if found.offload == "sequential" and found.offload_target == "cpu":
        return {phase: layers[OWNER[phase]] for phase in phases}
    if found.offload == "model" and found.offload_target != "device":
        return {phase: weights[OWNER[phase]] for phase in phases}
    whole = sum(weights.values())
    without_text = whole - weights["text_encoder"]
    if found.text_encoder == "cpu" and found.offload_target == "cpu":
        return dict.fromkeys(phases, without_text)
    if found.text_encoder == "unloaded" and found.offload_target != "device":
        return {phase: whole if phase == "text" else without_text for phase in phases}
    return dict.fromkeys(phases, whole)


def deep_map_bytes(workload: Workload, found: Decisions) -> int:
    """What all images' deep maps take that are kept from step to step."""
    if workload.deep_branch is None:
        return 0
    level, channels = workload.unet.deep_map(workload.deep_branch)
    height, width = (-(-side // (1 << level)) for side in workload.latents)
    return workload.images * workload.rows * channels * height * width * found.width("unet")


def latent_bytes(workload: Workload) -> int:
    """The latents of all images in float32, those that the sampler remembers among them, and the encoded prompts."""
    height, width = workload.latents
    latents = workload.images * workload.unet.in_channels * height * width * 4
    context = workload.images * workload.rows * TEXT * max(workload.unet.context) * 4
    return 6 * latents + context
