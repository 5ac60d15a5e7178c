"""The words of a plan: what can be asked for, and what can be decided. Plain data; nothing here decides.

What a pipeline does with each decision is said once, in ``MEANING``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from russet.errors import ArgumentTypeError, InputError

COMPONENTS = ("text_encoder", "unet", "vae", "safety_checker")
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}

MEANING: Mapping[str, str] = {
    "dtype.text_encoder": "name of the torch dtype that the text encoders' parameters and inputs have",
    "dtype.unet": "the same for the UNet; latents stay float32 between steps and are cast on the way in",
    "dtype.vae": "the same for the VAE; latents are cast to it before decoding, pictures to it before encoding",
    "dtype.safety_checker": "the same for the safety checker",
    "attention.text_encoder": "AttentionChoice to build and hand to the text encoders' set_attention",
    "attention.unet": "AttentionChoice to build and hand to the UNet's set_attention",
    "attention.vae": "AttentionChoice to build and hand to the VAE's set_attention",
    "contiguous_attention": "True: queries, keys and values are made contiguous before attention",
    "causal_mask": "'float': the text encoder adds a float mask (0 and -inf); is_causal=True is never used",
    "group_norm": "'native', or 'composed' of plain operations: for every GroupNorm of UNet and VAE",
    "layer_norm": "'native', or 'float32': every LayerNorm's input and weights are cast to it, and its result back",
    "elementwise": "'plain', or 'fused': norms, activations and sums of UNet and VAE by kernels that do several",
    "gated_products": "True: products of the UNet's gated layers are kernels that gate what they multiply",
    "convolutions": "'direct', or 'winograd': those of 3×3 in UNet and VAE with fewer multiplications",
    "doubling": "'repeated': a map's pixels are, and what comes of it is convolved; or 'transposed': the same of large"
    " maps by one transposed convolution, with sums of the weights",
    "linear_inputs": "'as given', or 'flat': tokens enter linear layers, in every network, as one long row of them",
    "linear_layers": "'native': by the library that PyTorch takes; 'onednn': by oneDNN, in every network",
    "freed_memory": "'returned' to the system as the C library sees fit; or 'kept' for the next operation while the"
    " UNet works, and returned afterwards; the VAE's, whose maps are larger, at once",
    "joined_products": "True: weights multiplied with one input lie side by side, and are one product",
    "residual_sums": "'apart'; 'in products': the UNet's sums with a product are part of it (see russet.models.sums);"
    " 'in products, with copies': also those that need copies of weights",
    "times": "'ahead': what the UNet makes of the times of a run is computed before they come; or 'each call'",
    "text_keys": "'kept': every layer's keys and values of the text are computed once a prompt; 'kept together': by one"
    " product for all layers; 'absorbed': and are"
    " multiplied into the weights around them; or 'each call'",
    "graphs": "True: UNet calls are recorded as CUDA graphs and replayed",
    "memory_format": "'channels_last' or 'contiguous': module.to(memory_format=…) of UNet and VAE, and of what enters",
    "non_blocking": "the argument of that name of every copy to the device",
    "looks": "when the looks for values that are not finite, one every few steps, are read: 'at once'; 'one later',"
    " while the device works on; or 'at the end' of the run, in which the host then stays a step ahead of the device",
    "micro_batch": "how many images the UNet sees in one call (with guidance it sees twice as many rows)",
    "vae_batch": "how many images the VAE decodes or encodes in one call",
    "vae_tile": "Tile to decode and encode by, or None for the whole picture at once",
    "text_encoder": "'device': it is there all the time; 'cpu': it encodes on the CPU and stays there; 'freed': its"
    " weights are dropped once the prompt is encoded, and read from the checkpoint again for the next prompt",
    "offload": "None: all components are on the device; 'model': each is there only while it works; 'sequential': each"
    " layer only while it works",
    "idle_weights": "where weights are that are not on the device: 'cpu'; 'dropped' (deleted, and read from the"
    " checkpoint again when needed; those of layers, 'sequential', stay on the CPU); 'kept': in the"
    " memory that CPU and device share; moving them frees nothing",
    "watermark": "(high, low): set PYTORCH_MPS_HIGH_/LOW_WATERMARK_RATIO before mps is first used, or asked;"
    " None: leave them",
    "bucket": "every size is obeyed; one that is no multiple of this many pixels is worth a note to the caller",
    "priming": "True: run one step of the first call, discard it, and start the call again",
}


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """Which attention to build (see ``russet.models.attention``), inside out: ``kind``, then ``upcast``, then ``pad``.

    ``fused``: torch's own. ``sliced``: at most ``rows`` of the batch·heads score matrices at a time. ``chunked``:
    ``queries`` of each at a time, over ``keys`` at a time (None: all keys), so that no full score matrix exists.
    ``pad`` lists the head sizes that kernels exist for: ``padded(…, dims=pad)`` fills smaller heads with zero columns.
    ``upcast``: scores and softmax in float32.
    """

    kind: Literal["fused", "sliced", "chunked"] = "fused"
    rows: int | None = None
    queries: int | None = None
    keys: int | None = None
    pad: tuple[int, ...] = ()
    upcast: bool = False

    def __str__(self) -> str:
        how = {
            "fused": "fused",
            "sliced": f"sliced, {self.rows} score matrices at a time",
            "chunked": f"chunked, {self.queries} queries"
            + (f" × {self.keys} keys" if self.keys else "")
            + " at a time",
        }[self.kind]
        pads = " or ".join(map(str, self.pad))
        return how + (f", heads padded to {pads}" if pads else "") + (", float32 scores" if self.upcast else "")


@dataclass(frozen=True)
class Tile:
    """A VAE tile: ``size`` latents square, neighbours sharing ``overlap`` latents (8 pixels each) that are blended."""

    size: int
    overlap: int

    def __str__(self) -> str:
        return f"{self.size * 8}×{self.size * 8} pixels, {self.overlap * 8} shared"


TEXT = 77  # tokens of a prompt
TILE = Tile(size=64, overlap=16)
SMALL_TILE = Tile(size=32, overlap=8)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user decided explicitly; None everywhere means: let the plan decide.

    ``dtype`` is one name for all components, or a mapping of component to name. ``attention_slicing`` is what
    ``enable_attention_slicing`` takes: ``"auto"`` (half of the heads at a time), ``"max"`` (one at a time), or a number
    of heads; ``"off"`` is ``disable_attention_slicing``: the whole score matrix, where the plan would have split it.
    ``vae_tiling`` True is in tiles, False never; ``vae_slicing`` True is one image at a time. ``fast_paths``
    False is PyTorch's own operations and nothing else. ``offload`` is
    ``"model"``, ``"sequential"`` or ``"off"``. ``rereadable`` is no wish but a fact: whether the pipeline can drop
    weights and read them from their checkpoint again, the one way to free memory that CPU and device share. So is
    ``unnoticed``: that nobody but the pipeline has looked at the text encoder, who could miss it or have changed it.

    Raises:
        InputError: a value outside of what is listed here.
    """

    dtype: str | Mapping[str, str] | None = None
    attention_slicing: str | int | None = None
    vae_tiling: bool | None = None
    vae_slicing: bool | None = None
    offload: str | None = None
    text_encoder: str | None = None
    micro_batch: int | None = None
    memory_format: str | None = None
    fast_paths: bool | None = None
    rereadable: bool = False
    unnoticed: bool = False
    user: Mapping[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, options in {
            "offload": ("model", "sequential", "off"),
            "text_encoder": ("device", "cpu", "freed"),
            "memory_format": ("contiguous", "channels_last"),
        }.items():
            if getattr(self, name) not in (None, *options):
                raise InputError(f"{name} must be one of {', '.join(options)}, not {getattr(self, name)!r}")
        for name in ("vae_tiling", "vae_slicing", "fast_paths"):
            if getattr(self, name) not in (None, True, False):
                raise ArgumentTypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        check_count("micro_batch", self.micro_batch)
        if self.attention_slicing not in (None, "auto", "max", "off"):
            check_count("attention slice size", self.attention_slicing, " or 'auto' or 'max'")
        object.__setattr__(self, "user", self._explicit())

    def _explicit(self) -> dict[str, Any]:
        """Decision → the user's value, for those whose value the user alone settles."""
        found: dict[str, Any] = {f"dtype.{name}": dtype for name, dtype in self._dtypes().items()}
        for name in ("text_encoder", "micro_batch", "memory_format"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        if self.offload is not None:
            found["offload"] = None if self.offload == "off" else self.offload
        if self.vae_tiling is not None:
            found["vae_tile"] = TILE if self.vae_tiling else None
        if self.vae_slicing:
            found["vae_batch"] = 1
        if self.fast_paths is False:
            found |= dict.fromkeys(("gated_products", "joined_products", "graphs"), False)
            found |= {"elementwise": "plain", "residual_sums": "apart", "times": "each call", "text_keys": "each call"}
            found |= {"convolutions": "direct", "doubling": "repeated"}
            found |= {"linear_layers": "native", "freed_memory": "returned"}
        return found

    def _dtypes(self) -> dict[str, str]:
        given = dict.fromkeys(COMPONENTS, self.dtype) if isinstance(self.dtype, str) else dict(self.dtype or {})
        for name, dtype in given.items():
            if name not in COMPONENTS or dtype not in DTYPES:
                options = f"{', '.join(DTYPES)} for one of {', '.join(COMPONENTS)}"
                raise InputError(f"a dtype is one of {options}, not {dtype!r} for {name!r}")
        return {name: str(dtype) for name, dtype in given.items()}


def check_count(name: str, value: Any, otherwise: str = "") -> None:
    """Raises InputError unless ``value`` is None or a whole number above 0."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} must be a whole number{otherwise}, not {value!r}")
    if value < 1:
        raise InputError(f"{name} must be at least 1{otherwise}, not {value}")
