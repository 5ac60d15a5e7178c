"""Peak memory of a call, predicted from shapes before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from russet.planning.activations import Arithmetic, decoder_peak, encoder_peak, tower_peak, unet_peak
from russet.planning.calls import tile_latents, unet_rows
from russet.planning.decisions import Decisions
from russet.planning.parameters import counts, largest_layers
from russet.planning.plan_types import TEXT, AttentionChoice
from russet.planning.prepared import made_before, text_key_bytes
from russet.planning.workload import Sizes, TransformerSizes, UNetSizes, VAESizes

__all__ = ["Estimate", "Sizes", "TransformerSizes", "UNetSizes", "VAESizes", "predict", "resident"]

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


def predict(sizes: Sizes, found: Decisions) -> Estimate:
    """The estimate for one way of doing the work."""
    needs = phase_activations(sizes, found)
    weights = resident(sizes, found, tuple(needs))
    kept = latent_bytes(sizes) + (CUDA_LIBRARIES if on_cuda(found) else 0)
    pictures = sizes.images * 3 * sizes.width * sizes.height * 4
    beside = {"encode": 2 * pictures, "decode": pictures + recorded(sizes, found), "check": 2 * pictures}
    beside["denoise"] = recorded(sizes, found) + made_before(sizes, found, unet_rows(sizes, found))
    needs["decode"] = max(needs["decode"], pictures)  # those of all parts are joined when the last part is done
    return Estimate(
        tuple(Phase(name, weights[name], needed, kept + beside.get(name, 0)) for name, needed in needs.items())
    )


def recorded(sizes: Sizes, found: Decisions) -> int:
    """What recorded calls hold for good: their own copy of the text's keys and values."""
    return text_key_bytes(sizes, found) if found["graphs"] and found["text_keys"] != "each call" else 0


def on_cuda(found: Decisions) -> bool:
    """Whether the device has memory of its own."""
    return bool(found["idle_weights"] == "cpu")


def phase_activations(sizes: Sizes, found: Decisions) -> dict[str, int]:
    """Peak activation bytes of each phase, in the order they happen."""

    def how(component: str) -> Arithmetic:
        attention = AttentionChoice() if component == "safety_checker" else found.attention(component)
        return Arithmetic(
            width=found.width(component),
            attention=attention,
            composed=found["group_norm"] == "composed",
            reordered=reordered(found),
            winograd=found["convolutions"] == "winograd" and found.dtype(component) == "float32",
            reuses=found["elementwise"] == "fused" and found.offload != "sequential",
            transposed=found["doubling"] == "transposed",
            gated=found["gated_products"],
            summed=found["residual_sums"] != "apart",
            absorbed=found["text_keys"] == "absorbed",
        )

    needs = {}
    vae = min(found.vae_batch, sizes.images), tile_latents(sizes, found), how("vae")
    if sizes.text:
        rows = sizes.rows * sizes.images
        needs["text"] = max(tower_peak(tower, rows, how("text_encoder")) for tower in sizes.text)
    if sizes.encodes:
        needs["encode"] = encoder_peak(sizes.vae, *vae)
    needs["denoise"] = unet_peak(sizes.unet, unet_rows(sizes, found), sizes.latents, how("unet"))
    needs["denoise"] += deep_map_bytes(sizes, found)
    needs["decode"] = decoder_peak(sizes.vae, *vae)
    if sizes.vision:
        needs["check"] = tower_peak(sizes.vision, sizes.images, how("safety_checker"))
    return needs


def reordered(found: Decisions) -> bool:
    """Whether channels-last maps meet CUDA's GroupNorm, which works channel by channel, and not the fused one."""
    plain = found["elementwise"] == "plain" or found.offload == "sequential"  # layers that come and go are not fused
    return on_cuda(found) and plain and found.memory_format == "channels_last"


def resident(sizes: Sizes, found: Decisions, phases: Iterable[str]) -> dict[str, int]:
    """Bytes of parameters that count against the device's memory in each phase."""
    weights = {name: count * found.width(name) for name, count in counts(sizes).items()}
    layers = {name: count * found.width(name) for name, count in largest_layers(sizes).items()}
    if found.offload == "sequential" and found.idle_weights == "cpu":
        return {phase: layers[OWNER[phase]] for phase in phases}
    if found.offload == "model" and found.idle_weights != "kept":
        return {phase: weights[OWNER[phase]] for phase in phases}
    whole = sum(weights.values())
    without_text = whole - weights["text_encoder"]
    if found.text_encoder == "cpu" and found.idle_weights == "cpu":
        return dict.fromkeys(phases, without_text)
    if found.text_encoder == "freed" and found.idle_weights != "kept":
        return {phase: whole if phase == "text" else without_text for phase in phases}
    return dict.fromkeys(phases, whole)


def deep_map_bytes(sizes: Sizes, found: Decisions) -> int:
    """What all images' deep maps take that are kept from step to step."""
    if sizes.deep_branch is None:
        return 0
    level, channels = sizes.unet.deep_map(sizes.deep_branch)
    height, width = (-(-side // (1 << level)) for side in sizes.latents)
    return sizes.images * sizes.rows * channels * height * width * found.width("unet")


def latent_bytes(sizes: Sizes) -> int:
    """The latents of all images in float32, those that the sampler remembers among them, and the encoded prompts."""
    height, width = sizes.latents
    latents = sizes.images * sizes.unet.in_channels * height * width * 4
    context = sizes.images * sizes.rows * TEXT * max(sizes.unet.context) * 4
    return 6 * latents + context
