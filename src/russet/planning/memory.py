"""Peak memory of a call, predicted from shapes before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from russet.backends.gemm_heuristics import ONES, PADDED, REPEATED
from russet.models.tiny_vae import TinyVAEConfig
from russet.models.unet_config import UNetConfig
from russet.planning.activations import Arithmetic, Attended, decoder_peak, encoder_peak, tower_peak, unet_peak
from russet.planning.plan_types import TEXT, AttentionChoice, Decisions
from russet.planning.workload import Workload

CUDA_LIBRARIES = 2**26  # bytes that cuBLAS keeps to work in, measured on an H200 by benchmarks/memory.py
PRECOMPUTED = 50  # timesteps that are computed together; Stable Diffusion 1.5's take 2 MB in half precision
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


def predict(workload: Workload, found: Decisions) -> Estimate:
    """The estimate for one way of doing the work."""
    needs = phase_activations(workload, found)
    weights = resident(workload, found, tuple(needs))
    kept = latent_bytes(workload) + (CUDA_LIBRARIES if on_cuda(found) else 0)
    pictures = workload.images * 3 * workload.width * workload.height * 4
    beside = {"encode": 2 * pictures, "decode": pictures + recorded(workload, found), "check": 2 * pictures}
    beside["denoise"] = recorded(workload, found) + precomputed_bytes(workload, found, unet_rows(workload, found))
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


def recorded(workload: Workload, found: Decisions) -> int:
    """What recorded calls hold for good: their own copy of the text's keys and values."""
    return prompt_kv_bytes(workload, found) if found["cuda_graphs"] and found["prompt_cache"] != "off" else 0


def on_cuda(found: Decisions) -> bool:
    """Whether the device has memory of its own."""
    return bool(found["offload_target"] == "cpu")


def phase_activations(workload: Workload, found: Decisions) -> dict[str, int]:
    """Peak activation bytes of each phase, in the order they happen."""

    def how(component: str) -> Arithmetic:
        attention = AttentionChoice() if component == "safety_checker" else found.attention(component)
        return Arithmetic(
            width=found.width(component),
            attention=attention,
            composed=found["group_norm"] == "composed",
            reordered=reordered(found),
            winograd=found["winograd"] and found.dtype(component) == "float32",
            reuses=found["ops"] == "triton" and found.offload != "sequential",
            transposed=found["upsample_fusion"],
            gated=found["fused_geglu"],
            summed=found["residual_fusion"] != "off",
            absorbed=found["prompt_cache"] == "folded into weights",
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
    weights = {name: count * found.width(name) for name, count in workload.parameters.items()}
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


def deep_map(unet: UNetConfig, branch: int) -> tuple[int, int]:
    """Level and channels of the map that enters the way up's residual block of a branch; 0 is the outermost."""
    stages = unet.output_stages
    return stages[-1 - branch].level, stages[-2 - branch].channels


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


# --- what is computed before the first step and kept to the end ---


def precomputed_bytes(workload: Workload, found: Decisions, rows: int) -> int:
    """The prompt cache, timestep embeddings and copied weights, for ``rows`` rows in a call of the UNet."""
    total = prompt_cache_bytes(workload, found)
    if found["timestep_embeddings"] == "precomputed":
        total += timestep_embedding_bytes(workload, found)
    if found["residual_fusion"] == "with weight copies":
        total += weight_copy_bytes(workload, found, rows, found.attention("unet"))
    return total


def prompt_cache_bytes(workload: Workload, found: Decisions) -> int:
    """What the prompt cache takes in the form that was decided."""
    if found["prompt_cache"] == "off":
        return 0
    folded = found["prompt_cache"] == "folded into weights"
    return folded_bytes(workload, found) if folded else prompt_kv_bytes(workload, found)


def prompt_kv_bytes(workload: Workload, found: Decisions) -> int:
    """What the keys and values of all prompts take, in all layers."""
    features = sum(stage.channels * (stage.depth or 0) * (1 + stage.only_cross) for stage in workload.unet.stages)
    return workload.images * workload.rows * TEXT * 2 * features * found.width("unet")


def folded_bytes(workload: Workload, found: Decisions) -> int:
    """What the projections of all cross-attention layers take with the prompts' keys and values folded into them."""
    features = sum(stage.channels * stage.heads * (stage.depth or 0) for stage in workload.unet.stages)
    return workload.images * workload.rows * TEXT * 2 * features * found.width("unet")


def timestep_embedding_bytes(workload: Workload, found: Decisions) -> int:
    """What precomputed timestep embeddings take: one each, and its projection for every residual block."""
    unet = workload.unet
    outputs = sum(stage.channels for stage in unet.stages if stage.resampling != "down")
    return PRECOMPUTED * (unet.time_features + outputs) * found.width("unet")


def weight_copy_bytes(workload: Workload, found: Decisions, rows: int, attention: AttentionChoice | None = None) -> int:
    """What copies of weights take: of self-attention's output with its bias, of heads padded, of shortcuts repeated."""
    number, total = found.width("unet"), 0
    for stage in workload.unet.stages:
        width, heads = stage.channels, stage.heads
        if stage.depth and not stage.only_cross:
            dim = width // heads
            wide = next((size for size in (attention.pad if attention else ()) if size >= dim), dim)
            inward = 3 * heads * wide * width * number
            padded = wide > dim and inward <= PADDED
            outward = (heads * (wide if padded else dim) + ONES) * width * number
            total += stage.depth * (outward + (inward if padded else 0))
        repeated = rows * stage.inputs * width * number
        total += repeated if stage.inputs != width and repeated <= REPEATED else 0
    return total
