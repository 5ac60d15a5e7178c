"""The data types of a plan: what the user may request, what is decided, and each decision's value with its reason.

``MEANING`` says once, for every decision, what the code that carries a plan out does with its value.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from typing_extensions import Self

from russet.errors import ArgumentTypeError, InputError
from russet.passes import PASSES

COMPONENTS = ("text_encoder", "unet", "vae", "safety_checker")
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}

MEANING: Mapping[str, str] = {
    "dtype.text_encoder": "name of the torch dtype of the text encoders' parameters and inputs",
    "dtype.unet": "the same for the UNet; latents stay float32 between steps and are cast before each call",
    "dtype.vae": "the same for the VAE; latents are cast to it before decoding, images before encoding",
    "dtype.safety_checker": "the same for the safety checker",
    "attention.text_encoder": "AttentionChoice of the text encoders",
    "attention.unet": "AttentionChoice of the UNet",
    "attention.vae": "AttentionChoice of the VAE",
    "contiguous_attention": "True: queries, keys and values are made contiguous before attention",
    "group_norm": "'native', or 'composed' of simple operations: every GroupNorm of UNet and VAE",
    "layer_norm": "'native', or 'float32': every LayerNorm's input and weights are cast to it, and its result back",
    "flatten_linear_inputs": "True: every linear layer gets its tokens as one matrix, without a batch dimension",
    "duplicate_single_rows": "True: a vector that enters a linear layer alone is computed twice",
    "float32_gelu": "True: every GELU's input is cast to float32, and its result back",
    "memory_format": "'channels_last' or 'contiguous': of the convolutions' weights in UNet and VAE, and their inputs",
    "finite_checks": "when the checks for NaN and infinity (one every five steps) are read by the CPU: 'immediate';"
    " 'deferred' by one check, while the device goes on; 'at the end' of the run",
    "micro_batch": "how many images one UNet call computes (with guidance it gets twice as many rows)",
    "vae_batch": "how many images the VAE decodes or encodes in one call",
    "vae_tile": "Tile to decode and encode by, or None for the whole image at once",
    "text_encoder": "'device': it stays there; 'cpu': it encodes on the CPU; 'unloaded': its weights are removed from"
    " memory after the prompt is encoded, and read from the checkpoint again for the next prompt",
    "offload": "None: all networks stay on the device; 'model': each is there only while it works; 'sequential': each"
    " layer is there only while it works",
    "offload_target": "where the weights of an offloaded network are: 'cpu'; 'disk': removed from memory and read from"
    " the checkpoint again ('sequential' offload keeps them on the CPU); 'device': they stay, because CPU and GPU"
    " share one memory and moving them would free nothing",
    "size_multiple": "widths and heights that are not a multiple of this many pixels get a note in the result",
    "warm_up": "True: before the first call on a device, one step is computed and discarded",
    **{one.name: one.meaning for one in PASSES},
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


TILE = Tile(size=64, overlap=16)
SMALL_TILE = Tile(size=32, overlap=8)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user chose explicitly; None everywhere means that the plan decides.

    ``dtype`` is one name for all components, or a mapping of component to name. ``attention_slicing`` is what
    ``enable_attention_slicing`` takes: ``"auto"`` (half of the heads at a time), ``"max"`` (one at a time), or a number
    of heads; ``"off"`` is ``disable_attention_slicing``: the whole score matrix, where the plan would have split it.
    ``vae_tiling`` True is in tiles, False never; ``vae_slicing`` True is one image at a time. ``fast_paths``
    False is PyTorch's own operations and nothing else. ``offload`` is
    ``"model"``, ``"sequential"`` or ``"off"``.

    Two fields are facts about the pipeline. ``reloadable``: whether it can read all weights from their checkpoint
    again, so that removing them frees memory that CPU and GPU share. ``text_encoder_exclusive``: whether no code
    outside of the pipeline has seen the text encoder, so that nobody can have changed its weights or can miss them.

    Raises:
        InputError: a value that is not listed here.
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
    reloadable: bool = False
    text_encoder_exclusive: bool = False
    user: Mapping[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, options in {
            "offload": ("model", "sequential", "off"),
            "text_encoder": ("device", "cpu", "unloaded"),
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
        """Decision → the user's value, for the decisions that the request alone determines."""
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
        return found

    def _dtypes(self) -> dict[str, str]:
        given = dict.fromkeys(COMPONENTS, self.dtype) if isinstance(self.dtype, str) else dict(self.dtype or {})
        given = {decided_as(name): dtype for name, dtype in given.items()}
        for name, dtype in given.items():
            if name not in COMPONENTS or dtype not in DTYPES:
                options = f"{', '.join(DTYPES)} for one of {', '.join(COMPONENTS)}"
                raise InputError(f"a dtype is one of {options}, not {dtype!r} for {name!r}")
        return {name: str(dtype) for name, dtype in given.items()}


def decided_as(component: str) -> str:
    """The component whose decisions hold for this one: XL's two text encoders are decided about together."""
    return "text_encoder" if component == "text_encoder_2" else component


def check_count(name: str, value: Any, otherwise: str = "") -> None:
    """Raises InputError unless ``value`` is None or a whole number above 0."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} must be a whole number{otherwise}, not {value!r}")
    if value < 1:
        raise InputError(f"{name} must be at least 1{otherwise}, not {value}")


@dataclass(frozen=True)
class Decision:
    """One decision: ``value`` as ``MEANING[name]`` says, ``reason`` in a sentence, ``by`` the plan or the user."""

    name: str
    value: Any
    reason: str
    by: Literal["plan", "user"] = "plan"

    def __str__(self) -> str:
        return f"{self.name}: {format_value(self.value)} ({'as requested; ' if self.by == 'user' else ''}{self.reason})"


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """Some decisions; ``found["micro_batch"]`` is the value of one. A name that was not decided raises KeyError."""

    decisions: tuple[Decision, ...]

    def __getitem__(self, name: str) -> Any:
        return self._by_name[name].value

    def why(self, name: str) -> Decision:
        """A decision with its reason."""
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, Decision]:
        return {decision.name: decision for decision in self.decisions}

    def extended(self, more: Iterable[Decision]) -> Self:
        """These decisions and more."""
        return type(self)(decisions=(*self.decisions, *more))

    def dtype(self, component: str) -> str:
        """The torch dtype's name for ``"text_encoder"``, ``"unet"``, ``"vae"`` or ``"safety_checker"``."""
        return cast(str, self[f"dtype.{decided_as(component)}"])

    def width(self, component: str) -> int:
        """Bytes of one number in a component."""
        return DTYPES[self.dtype(component)]

    def attention(self, component: str) -> AttentionChoice:
        """The attention for ``"text_encoder"``, ``"unet"`` or ``"vae"``."""
        return cast(AttentionChoice, self[f"attention.{decided_as(component)}"])

    @property
    def micro_batch(self) -> int:
        return cast(int, self["micro_batch"])

    @property
    def vae_batch(self) -> int:
        return cast(int, self["vae_batch"])

    @property
    def vae_tile(self) -> Tile | None:
        return cast("Tile | None", self["vae_tile"])

    @property
    def text_encoder(self) -> str:
        return cast(str, self["text_encoder"])

    @property
    def offload(self) -> str | None:
        return cast("str | None", self["offload"])

    @property
    def offload_target(self) -> str:
        return cast(str, self["offload_target"])

    @property
    def memory_format(self) -> str:
        return cast(str, self["memory_format"])

    @property
    def warm_up(self) -> bool:
        return cast(bool, self["warm_up"])


def resolve(user: Mapping[str, Any], name: str, value: Any, reason: str, note: str = "your choice") -> Decision:
    """The user's value where there is one, with ``note``; else the plan's value, with its reason."""
    if name in user:
        return Decision(name, user[name], note, by="user")
    return Decision(name, value, reason)


def format_value(value: Any) -> str:
    """A decision's value as a person reads it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
