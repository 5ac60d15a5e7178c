"""Peak memory of a call, predicted from shapes before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from russet.devices import activations
from russet.devices.parameters import counts
from russet.devices.setup import Setup
from russet.devices.sizes import Sizes, TransformerSizes, UNetSizes, VAESizes

__all__ = ["Estimate", "Sizes", "TransformerSizes", "UNetSizes", "VAESizes", "predict"]


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


def predict(sizes: Sizes, setup: Setup) -> Estimate:
    """The estimate for one way of doing the work."""
    needs = phase_activations(sizes, setup)
    kept = latent_bytes(sizes)
    pictures = 2 * sizes.images * 3 * sizes.width * sizes.height * 4
    weights = resident(sizes, setup, tuple(needs))
    return Estimate(
        tuple(
            Phase(name, weights[name], needed, kept + (pictures if name in ("decode", "encode", "check") else 0))
            for name, needed in needs.items()
        )
    )


OWNER = {"text": "text_encoder", "encode": "vae", "denoise": "unet", "decode": "vae", "check": "safety_checker"}


def phase_activations(sizes: Sizes, setup: Setup) -> dict[str, int]:
    """Peak activation bytes of each phase, in the order they happen."""
    found = {}
    if sizes.text:
        found["text"] = max(
            activations.tower_peak(tower, sizes.rows * sizes.images, setup.width("text_encoder"))
            for tower in sizes.text
        )
    vae = activations.vae_peak(
        sizes.vae,
        min(setup.vae_batch, sizes.images),
        tile_latents(sizes, setup),
        setup.width("vae"),
        setup.vae_attention,
    )
    if sizes.encodes:
        found["encode"] = vae
    found["denoise"] = activations.unet_peak(
        sizes.unet,
        min(setup.micro_batch, sizes.images) * sizes.rows,
        sizes.latents,
        setup.width("unet"),
        setup.unet_attention,
    )
    found["decode"] = vae
    if sizes.vision:
        found["check"] = activations.tower_peak(sizes.vision, sizes.images, setup.width("safety_checker"))
    return found


def tile_latents(sizes: Sizes, setup: Setup) -> tuple[int, int]:
    """What the VAE sees at once: the whole picture's latents, or a tile's."""
    if setup.vae_tile is None:
        return sizes.latents
    height, width = sizes.latents
    return min(height, setup.vae_tile.size), min(width, setup.vae_tile.size)


def resident(sizes: Sizes, setup: Setup, phases: tuple[str, ...]) -> dict[str, int]:
    """Bytes of parameters that count against the device's memory in each phase."""
    sized = {name: count * setup.width(name) for name, count in counts(sizes).items()}
    found = {}
    for phase in phases:
        owner = OWNER[phase]
        if setup.offload == "sequential" and setup.drops:
            found[phase] = sized[owner] // 16
        elif setup.offload == "model" and setup.drops:
            found[phase] = sized[owner]
        else:
            present = [name for name in sized if name != "text_encoder"]
            stays = setup.text_encoder == "device" or not setup.drops
            if stays or (phase == "text" and setup.text_encoder == "freed"):
                present.append("text_encoder")
            found[phase] = sum(sized[name] for name in present)
    return found


def latent_bytes(sizes: Sizes) -> int:
    """The latents of all images in float32, those the sampler remembers included, and the prompts' encodings."""
    height, width = sizes.latents
    latents = sizes.images * sizes.unet.in_channels * height * width * 4
    context = sizes.images * sizes.rows * 77 * sizes.unet.context * 4
    return 6 * latents + context


def unet_calls(sizes: Sizes, setup: Setup) -> list[activations.Attended]:
    """The UNet's self-attentions, one for each level that has any."""
    u, (height, width) = sizes.unet, sizes.latents
    rows = min(setup.micro_batch, sizes.images) * sizes.rows
    depths = [max(down, up) for down, up in zip(u.depth, u.up_depth, strict=True)]
    depths[-1] = max(depths[-1], u.mid_depth)
    calls = []
    for level, depth in enumerate(depths):
        if depth:
            tokens = -(-height // (1 << level)) * -(-width // (1 << level))
            heads = u.heads[level]
            dim = u.channels[level] // heads
            calls.append(activations.Attended(batch=rows, heads=heads, queries=tokens, keys=tokens, dim=dim))
    return calls or [activations.Attended(batch=rows, heads=1, queries=1, keys=1, dim=64)]


def vae_call(sizes: Sizes, setup: Setup) -> activations.Attended:
    """The VAE's one attention, of a single head."""
    height, width = tile_latents(sizes, setup)
    tokens, images = height * width, min(setup.vae_batch, sizes.images)
    return activations.Attended(batch=images, heads=1, queries=tokens, keys=tokens, dim=sizes.vae.channels[-1])
