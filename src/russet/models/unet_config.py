"""The UNet's config: every value that Stable Diffusion checkpoints set, checked before anything is built from it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from russet.config import Config
from russet.models.activations import ACTIVATIONS

HAS_ATTENTION = {
    "DownBlock2D": False,
    "CrossAttnDownBlock2D": True,
    "UpBlock2D": False,
    "CrossAttnUpBlock2D": True,
    "UNetMidBlock2D": False,
    "UNetMidBlock2DCrossAttn": True,
}
DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
MID_BLOCKS = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn", None)

# Keys of which Stable Diffusion uses one value. Another one asks for a network that Russet does not have.
ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
ONE_OF: dict[str, tuple[Any, ...]] = {
    **ONLY_VALUE,
    "act_fn": tuple(ACTIVATIONS),
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None, "timestep", "projection"),
    "mid_block_type": MID_BLOCKS,
    "resnet_time_scale_shift": ("default", "scale_shift"),
}
DEPTHS = ("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block")
MOST_LAYERS = 1000  # a config is a stranger's text, and every layer is a place in a list before there is a model

POSITIVE = (
    "in_channels",
    "out_channels",
    "norm_num_groups",
    "norm_eps",
    "conv_in_kernel",
    "conv_out_kernel",
    "mid_block_scale_factor",
    "sample_size",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "attention_head_dim",
    "num_attention_heads",
    "time_embedding_dim",
    "time_cond_proj_dim",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "num_class_embeds",
)
PER_BLOCK = (
    "down_block_types",
    "up_block_types",
    "only_cross_attention",
    "layers_per_block",
    "cross_attention_dim",
    "attention_head_dim",
    "num_attention_heads",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
)


@dataclass(frozen=True)
class Level:
    """One resolution of the UNet, its share of the config's per-block values gathered.

    Attributes:
        channels: features of the map.
        depths: one number per residual block: how many transformer layers follow it; None where no transformer does.
        heads: attention heads.
        context: features of the text.
        only_cross: whether the first attention goes to the text as well.
    """

    channels: int
    depths: tuple[int | None, ...]
    heads: int
    context: int
    only_cross: bool

    def stage(
        self, number: int, inputs: int, depth: int | None, resampling: Literal["down", "up"] | None = None
    ) -> StageConfig:
        """One of its stages, where the level is the ``number``-th."""
        return StageConfig(
            level=number,
            inputs=inputs,
            channels=self.channels,
            depth=depth,
            heads=self.heads,
            context=self.context,
            only_cross=self.only_cross,
            resampling=resampling,
        )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One entry of the UNet's flat lists of stages.

    A stage is a residual block, a transformer of ``depth`` layers where that is not None, and a change of resolution
    where ``resampling`` is "up". A stage with ``resampling`` "down" is that convolution alone.

    Attributes:
        level: which resolution it computes at; 0 is the highest, and each level has half the side of the one before.
        inputs: channels that come in; on the way up those of the skip connection are among them.
        channels: channels that go out.
        depth: transformer layers behind the residual block; None where no transformer is.
        heads: attention heads.
        context: features of the text.
        only_cross: whether the transformer's first attention goes to the text as well.
    """

    level: int
    inputs: int
    channels: int
    depth: int | None
    heads: int
    context: int
    only_cross: bool
    resampling: Literal["down", "up"] | None = None


@dataclass(frozen=True, kw_only=True)
class UNetConfig(Config):
    """The JSON keys of ``UNet2DConditionModel``; a value per block is given as a list, from high resolution to low.

    ``attention_head_dim`` is, despite its name, the number of heads, unless ``num_attention_heads`` is given.
    ``upcast_attention`` is for who chooses the attention function: the checkpoint overflows half precision unless
    scores are summed in float32. ``dropout`` has a meaning in training only.

    Raises:
        ConfigError: a value that cannot be built, or lists whose lengths do not agree.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: int = 64

    def check(self) -> None:
        for name, values in ONE_OF.items():
            known = " or ".join(map(repr, values))
            self.require(self[name] in values, f"{name} {self[name]!r} is not supported; only {known} is")
        for name in POSITIVE:
            good = self[name] is None or all(size > 0 for size in _listed(self[name]))
            self.require(good, f"{name} must be positive, not {self[name]!r}")
        for name in DEPTHS:
            deepest = max((depth for entry in _listed(self[name]) for depth in _listed(entry)), default=0)
            self.require((deepest or 0) <= MOST_LAYERS, f"{name} may be at most {MOST_LAYERS}, not {deepest}")
        self._check_lengths()
        self._check_blocks()
        self._check_embeddings()

    def _check_lengths(self) -> None:
        blocks = len(self.block_out_channels)
        self.require(blocks > 0, "block_out_channels is empty")
        for name in PER_BLOCK:
            value = self[name]
            agrees = not isinstance(value, tuple) or len(value) == blocks
            self.require(agrees, f"{name} {value!r} must have {blocks} entries, as block_out_channels has")
        nested = any(isinstance(depth, tuple) for depth in _listed(self.transformer_layers_per_block))
        self.require(
            not nested or self.reverse_transformer_layers_per_block is not None,
            "a list within transformer_layers_per_block needs reverse_transformer_layers_per_block for the way up",
        )

    def _check_blocks(self) -> None:
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for kind in self[name]:
                self.require(kind in known, f"{name}: {kind!r} is not supported; only {' and '.join(known)} are")
        for channels in self.block_out_channels:
            fits = channels % self.norm_num_groups == 0
            self.require(fits, f"{channels} channels cannot form norm_num_groups={self.norm_num_groups} equal groups")
        for level in self._levels_with_attention:
            depths = [depth for depth in level.depths if depth is not None]
            self.require(min(depths) >= 0, f"transformer layers must not be negative, but are {depths}")
            even = level.channels % level.heads == 0
            self.require(even, f"{level.channels} channels cannot be shared equally by {level.heads} heads")
        contexts = {level.context for level in self._levels_with_attention}
        self.require(len(contexts) <= 1, f"cross_attention_dim must be the same in all blocks: {sorted(contexts)}")
        for name in ("conv_in_kernel", "conv_out_kernel"):
            self.require(self[name] % 2 == 1, f"{name} must be odd, not {self[name]}")
        self.require(self.downsample_padding in (0, 1), f"downsample_padding must be 0 or 1: {self.downsample_padding}")

    def _check_embeddings(self) -> None:
        width = self.block_out_channels[0]
        self.require(width % 2 == 0, f"the first of block_out_channels must be even, not {width}")
        needs = {
            "class_embed_type 'projection'": (
                self.class_embed_type == "projection",
                ("projection_class_embeddings_input_dim",),
            ),
            "addition_embed_type 'text_time'": (
                self.addition_embed_type == "text_time",
                ("projection_class_embeddings_input_dim", "addition_time_embed_dim"),
            ),
        }
        for reason, (asked, names) in needs.items():
            for name in names if asked else ():
                self.require(self[name] is not None, f"{reason} needs {name}")
        dim = self.addition_time_embed_dim
        self.require(dim is None or dim % 2 == 0, f"addition_time_embed_dim must be even, not {dim}")
        waves = min(width, dim or width) // 2
        self.require(0 <= self.freq_shift < waves, f"freq_shift must be from 0 to {waves - 1}, not {self.freq_shift}")

    @property
    def time_features(self) -> int:
        """Features of the time embedding."""
        return self.time_embedding_dim or self.block_out_channels[0] * 4

    @functools.cached_property
    def text_features(self) -> int | None:
        """Features of the text that the UNet attends to; None where it attends to none."""
        return next((level.context for level in self._levels_with_attention), None)

    @property
    def down_levels(self) -> tuple[Level, ...]:
        """The levels on the way down, from high resolution to low; a residual block per entry of ``depths``."""
        return self._levels(self.down_block_types, self.transformer_layers_per_block, extra=0)

    @property
    def mid_levels(self) -> tuple[Level, ...]:
        """The middle as a level, or nothing where the UNet has no middle."""
        if self.mid_block_type is None:
            return ()
        last = self._levels(self.down_block_types, self.transformer_layers_per_block, extra=0)[-1:]
        depth = self._per_block(self.transformer_layers_per_block)[-1]
        depths = (_listed(depth)[0],) if HAS_ATTENTION[self.mid_block_type] else ()
        return tuple(Level(level.channels, depths, level.heads, level.context, False) for level in last)

    @property
    def up_levels(self) -> tuple[Level, ...]:
        """The levels on the way up, from low resolution to high, each with one residual block more than going down."""
        back = self.reverse_transformer_layers_per_block
        depths = self._per_block(self.transformer_layers_per_block)[::-1] if back is None else back
        return self._levels(self.up_block_types[::-1], depths[::-1], extra=1)[::-1]

    @functools.cached_property
    def input_stages(self) -> tuple[StageConfig, ...]:
        """The stages on the way down, in order; each one's output is also the input of a skip connection."""
        stages: list[StageConfig] = []
        width, last = self.block_out_channels[0], len(self.block_out_channels) - 1
        for number, level in enumerate(self.down_levels):
            for depth in level.depths:
                stages.append(level.stage(number, width, depth))
                width = level.channels
            if number < last:
                stages.append(level.stage(number, width, None, "down"))
        return tuple(stages)

    @functools.cached_property
    def mid_stages(self) -> tuple[StageConfig, ...]:
        """The stages of the middle, at the lowest resolution: none, one, or one with a transformer and one without."""
        last = len(self.block_out_channels) - 1
        return tuple(
            level.stage(last, level.channels, depth) for level in self.mid_levels for depth in (*level.depths, None)
        )

    @functools.cached_property
    def output_stages(self) -> tuple[StageConfig, ...]:
        """The stages on the way up, in order; each takes the output of the one before and a skip connection."""
        stages: list[StageConfig] = []
        skips = [self.block_out_channels[0], *(stage.channels for stage in self.input_stages)]
        width, number = skips[-1], len(self.block_out_channels)
        for level in self.up_levels:
            number -= 1
            for depth in level.depths:
                stages.append(level.stage(number, width + skips.pop(), depth))
                width = level.channels
            if number:
                stages[-1] = replace(stages[-1], resampling="up")
        return tuple(stages)

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """All stages in the order in which they compute."""
        return (*self.input_stages, *self.mid_stages, *self.output_stages)

    @property
    def conditioned_per_row(self) -> bool:
        """Whether the time embedding depends on more than the timestep: on a class, or XL's pooled text and sizes."""
        classes = self.class_embed_type is not None or self.num_class_embeds is not None
        return classes or self.addition_embed_type is not None

    @property
    def _levels_with_attention(self) -> list[Level]:
        levels = (*self.down_levels, *self.mid_levels, *self.up_levels)
        return [level for level in levels if any(depth is not None for depth in level.depths)]

    def _levels(self, kinds: Sequence[str], depths: Any, extra: int) -> tuple[Level, ...]:
        """Levels from high resolution to low, each with ``extra`` residual blocks more than ``layers_per_block``."""
        heads = self.attention_head_dim if self.num_attention_heads is None else self.num_attention_heads
        columns = zip(
            kinds,
            self.block_out_channels,
            self._per_block(self.layers_per_block),
            self._per_block(depths),
            self._per_block(heads),
            self._per_block(self.cross_attention_dim),
            self._per_block(self.only_cross_attention),
            strict=True,
        )
        return tuple(
            Level(channels, self._depths(kind, depth, layers + extra), count, context, cross)
            for kind, channels, layers, depth, count, context, cross in columns
        )

    def _depths(self, kind: str, depth: int | tuple[int, ...], layers: int) -> tuple[int | None, ...]:
        """The transformer layers after each of ``layers`` residual blocks."""
        if not HAS_ATTENTION[kind]:
            return (None,) * layers
        agrees = isinstance(depth, int) or len(depth) == layers
        self.require(agrees, f"transformer layers {depth!r} must have {layers} entries, one for each residual block")
        return (depth,) * layers if isinstance(depth, int) else depth

    def _per_block(self, value: Any) -> tuple[Any, ...]:
        """One value for each block, where a single one stands for all."""
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


def _listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
