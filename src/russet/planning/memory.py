"""Peak memory of a call, predicted from shapes before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from russet.hardware.facts import Facts
from russet.models.clip_footprint import tower_peak
from russet.models.footprint import TEXT, Arithmetic, Attended
from russet.models.tiny_vae import TinyVAEConfig
from russet.models.unet_footprint import deep_map, unet_peak
from russet.models.vae_footprint import decoder_peak, encoder_peak
from russet.passes import PASSES, workarounds
from russet.passes.base import Footprint, Situation
from russet.planning.plan_types import COMPONENTS, AttentionChoice, Decisions, Request
from russet.planning.workload import Workload

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
    situation = Situation(facts, workload, request, found)
    footprints = [one.footprint(situation) for one in PASSES if found[one.name] != one.off]
    needs = phase_activations(workload, found, footprints)
    weights = resident(workload, found, tuple(needs))
    kept = latent_bytes(workload) + (CUDA_LIBRARIES if on_cuda(found) else 0)
    pictures = workload.images * 3 * workload.width * workload.height * 4
    recorded = sum(one.kept_after for one in footprints)
    beside = {"encode": 2 * pictures, "decode": pictures + recorded, "check": 2 * pictures}
    beside["denoise"] = recorded + sum(one.kept for one in footprints)
    needs["decode"] = max(needs["decode"], pictures)  # those of all parts are joined when the last part is done
    return Estimate(
        tuple(Phase(name, weights[name], needed, kept + beside.get(name, 0)) for name, needed in needs.items())
    )


# --- calls and tensors ---


def unet_rows(workload: Workload, found: Decisions) -> int:
    """Rows of latents that the UNet sees at once."""
    return min(found.micro_batch, workload.images) * workload.rows


def tile_latents(workload: Workload, found: Decisions) -> tuple[int, int]:
    """Height and width in latents of what the VAE sees at once: a whole picture, or a tile."""
    (height, width), tile = workload.latents, found.vae_tile
    return (height, width) if tile is None else (min(height, tile.size), min(width, tile.size))


def attention_calls(component: str, workload: Workload, found: Decisions) -> list[Attended]:
    """The attention calls of ``"unet"`` (one for each level that has any), ``"vae"`` or ``"text_encoder"``."""
    if component == "unet":
        return unet_calls(workload, found)
    if component == "vae":
        tiny = isinstance(workload.vae, TinyVAEConfig)
        return [] if tiny or not workload.vae.mid_block_add_attention else [vae_call(workload, found)]
    rows = workload.rows * workload.images  # as if all prompts were encoded at once
    return [
        Attended.own(rows, text.num_attention_heads, text.max_position_embeddings, text.hidden_size)
        for text in workload.text
    ]


def unet_calls(workload: Workload, found: Decisions) -> list[Attended]:
    """The UNet's self-attentions, one for each level that has any."""
    rows, (height, width) = unet_rows(workload, found), workload.latents
    levels = {stage.level: stage for stage in workload.unet.stages if stage.depth}
    return [
        Attended.own(rows, stage.heads, -(-height // (1 << level)) * -(-width // (1 << level)), stage.channels)
        for level, stage in sorted(levels.items())
    ]


def vae_call(workload: Workload, found: Decisions) -> Attended:
    """The VAE's one attention, of a single head."""
    height, width = tile_latents(workload, found)
    return Attended.own(min(found.vae_batch, workload.images), 1, height * width, vae_channels(workload)[-1])


def vae_channels(workload: Workload) -> tuple[int, ...]:
    """Channels of the decoder's levels, from high resolution to low."""
    vae = workload.vae
    return vae.decoder_block_out_channels if isinstance(vae, TinyVAEConfig) else vae.block_out_channels


def largest_tensors(workload: Workload, found: Decisions) -> Iterator[tuple[int, int]]:
    """(numbers, bytes per number) of the tensors that can pass a device's limits."""
    for call in unet_calls(workload, found):
        yield call.scores(found.attention("unet")), 4
        yield call.batch * call.heads * call.queries * TEXT, 4
        yield 8 * call.batch * call.heads * call.dim * call.queries, found.width("unet")  # the gated layer
    for call in attention_calls("vae", workload, found):
        yield call.scores(found.attention("vae")), 4
    call, channels = vae_call(workload, found), vae_channels(workload)
    area = call.batch * call.queries * workload.vae.pixels_per_latent**2
    yield channels[min(1, len(channels) - 1)] * area, found.width("vae")  # the last level's input


# --- what is kept, and the activations ---


def on_cuda(found: Decisions) -> bool:
    """Whether the device has memory of its own."""
    return bool(found["offload_target"] == "cpu")


def phase_activations(workload: Workload, found: Decisions, footprints: Sequence[Footprint]) -> dict[str, int]:
    """Peak activation bytes of each phase, in the order they happen."""

    def walk(component: str) -> dict[str, Any]:
        parts = [one.walk for one in footprints if component in one.components]
        fields = {name: value for part in parts for name, value in part.items()}
        if found.width(component) < 4:
            fields.pop("conv_workspace", None)  # only float32 is convolved otherwise
        return fields

    def how(component: str) -> Arithmetic:
        attention = AttentionChoice() if component == "safety_checker" else found.attention(component)
        return Arithmetic(
            width=found.width(component),
            attention=attention,
            norm_workspace=workarounds.norm_workspace(found),
            reordered=reordered(found),
            **walk(component),
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
    weights = {name: workload.parameters.get(name, 0) * found.width(name) for name in COMPONENTS}
    if found.offload == "sequential" and found.offload_target == "cpu":
        return {phase: largest_layer(OWNER[phase], workload) * found.width(OWNER[phase]) for phase in phases}
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
    level, channels = deep_map(workload.unet, workload.deep_branch)
    height, width = (-(-side // (1 << level)) for side in workload.latents)
    return workload.images * workload.rows * channels * height * width * found.width("unet")


def latent_bytes(workload: Workload) -> int:
    """The latents of all images in float32, those that the sampler remembers among them, and the encoded prompts."""
    height, width = workload.latents
    latents = workload.images * workload.unet.in_channels * height * width * 4
    context = workload.images * workload.rows * TEXT * workload.text_features * 4
    return 6 * latents + context


def largest_layer(component: str, workload: Workload) -> int:
    """Parameters of the largest single layer of a component."""
    if component == "unet":
        return max(9 * stage.inputs * stage.channels + stage.channels for stage in workload.unet.stages)
    if component == "vae":
        widest = max(vae_channels(workload))
        return 9 * widest * widest + widest
    if component == "text_encoder":
        return max((text.vocab_size * text.hidden_size for text in workload.text), default=0)
    vision = workload.vision
    return (vision.hidden_size + 1) * vision.intermediate_size if vision else 0
