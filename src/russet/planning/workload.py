"""How large the work is, in plain numbers: read from config mappings, so that it is known before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from russet.errors import ConfigError, InputError

Numbers = Mapping[str, Any]


Depths = tuple["int | None", ...]


@dataclass(frozen=True, kw_only=True)
class UNetSizes:
    """The conditional UNet's shape, one entry per level from the finest down.

    ``down`` and ``up`` hold for each residual block of a level how many transformer layers follow it, None where no
    transformer does; ``middle`` likewise, and None where the UNet has no middle.
    """

    channels: tuple[int, ...]
    heads: tuple[int, ...]
    down: tuple[Depths, ...]
    up: tuple[Depths, ...]
    middle: Depths | None
    context: tuple[int, ...]
    in_channels: int = 4
    out_channels: int = 4
    added: int = 0  # width of the added embedding's input, 0 without one
    upcast: bool = False  # whether its scores overflow float16

    @classmethod
    def of(cls, config: Numbers) -> UNetSizes:
        channels = tuple(config.get("block_out_channels") or (320, 640, 1280, 1280))
        levels = len(channels)
        down_kinds = config.get("down_block_types") or ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]
        up_kinds = config.get("up_block_types") or ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1)
        layers = per_level(config.get("layers_per_block", 2), levels)
        depth = per_level(config.get("transformer_layers_per_block", 1), levels)
        back = config.get("reverse_transformer_layers_per_block")
        up_depth = depth if back is None else tuple(reversed(per_level(back, levels)))
        middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
        return cls(
            channels=channels,
            # the checkpoints' attention_head_dim is the number of heads, for historical reasons
            heads=per_level(config.get("num_attention_heads") or config.get("attention_head_dim", 8), levels),
            down=tuple(depths(*each) for each in zip(down_kinds, depth, layers, strict=True)),
            up=tuple(depths(*each) for each in zip(reversed(up_kinds), up_depth, (n + 1 for n in layers), strict=True)),
            middle=depths(middle, first(depth[-1]), 1) if middle else None,
            context=per_level(config.get("cross_attention_dim", 1280), levels),
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            added=config.get("projection_class_embeddings_input_dim") or 0,
            upcast=bool(config.get("upcast_attention")),
        )

    @property
    def blocks(self) -> list[tuple[int, int, int | None]]:
        """Level, channels that come in, and transformer layers behind it, of each residual block in their order."""
        found: list[tuple[int, int, int | None]] = []
        width, skips, bottom = self.channels[0], [self.channels[0]], len(self.channels) - 1
        for level, depths in enumerate(self.down):
            for depth in depths:
                found.append((level, width, depth))
                width = self.channels[level]
                skips.append(width)
            skips += [width] if level < bottom else []
        if self.middle is not None:
            found += [(bottom, width, depth) for depth in (None, *self.middle)]
        for level in reversed(range(bottom + 1)):
            for depth in self.up[level]:
                found.append((level, width + skips.pop(), depth))
                width = self.channels[level]
        return found

    @property
    def transformers(self) -> list[tuple[int, int, int]]:
        """Level, channels and layers of each transformer."""
        return [(level, self.channels[level], depth) for level, _, depth in self.blocks if depth]

    def deep_map(self, branch: int) -> tuple[int, int]:
        """Level and channels of the map that enters the way up's residual block of a branch; 0 is the outermost."""
        blocks = [(level, place) for level, depths in enumerate(self.up) for place in reversed(range(len(depths)))]
        level, place = blocks[branch]
        return level, self.channels[level if place else min(level + 1, len(self.channels) - 1)]

    def attends(self, level: int) -> bool:
        """Whether any transformer works at a level."""
        middle = self.middle if level == len(self.channels) - 1 else None
        return any(self.down[level]) or any(self.up[level]) or any(middle or ())


@dataclass(frozen=True, kw_only=True)
class VAESizes:
    """The autoencoder's shape; ``float32`` where its config says that float16 overflows in it.

    ``blocks`` is for a tiny autoencoder, which has one width, no attention and no norms: residual blocks of each level
    on the way down and on the way up; empty for another.
    """

    channels: tuple[int, ...]
    layers: int
    latent: int = 4
    float32: bool = False
    blocks: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, config: Numbers) -> VAESizes:
        if config.get("decoder_block_out_channels"):
            down, up = config.get("num_encoder_blocks", (1, 3, 3, 3)), config.get("num_decoder_blocks", (3, 3, 3, 1))
            return cls(
                channels=tuple(config["decoder_block_out_channels"]),
                layers=1,
                latent=config.get("latent_channels", 4),
                blocks=(tuple(down), tuple(up)),
            )
        return cls(
            channels=tuple(config.get("block_out_channels") or (64,)),
            layers=config.get("layers_per_block", 1),
            latent=config.get("latent_channels", 4),
            float32=bool(config.get("force_upcast", True)),
        )

    @property
    def factor(self) -> int:
        """Pixels per latent, along one side."""
        return 1 << (len(self.channels) - 1)


@dataclass(frozen=True, kw_only=True)
class TransformerSizes:
    """A CLIP tower's shape: the text encoder, or (``patch`` set) the vision tower with its projection."""

    width: int
    layers: int
    heads: int
    hidden: int
    tokens: int
    vocabulary: int = 0
    projection: int = 0
    patch: int = 0

    @classmethod
    def text(cls, config: Numbers, projected: bool = False) -> TransformerSizes:
        return cls(
            width=config.get("hidden_size", 512),
            layers=config.get("num_hidden_layers", 12),
            heads=config.get("num_attention_heads", 8),
            hidden=config.get("intermediate_size", 2048),
            tokens=config.get("max_position_embeddings", 77),
            vocabulary=config.get("vocab_size", 49408),
            projection=config.get("projection_dim", 512) if projected else 0,
        )

    @classmethod
    def vision(cls, config: Numbers) -> TransformerSizes:
        tower = {**(config.get("vision_config") or config)}
        patch, image = tower.get("patch_size", 32), tower.get("image_size", 224)
        return cls(
            width=tower.get("hidden_size", 768),
            layers=tower.get("num_hidden_layers", 12),
            heads=tower.get("num_attention_heads", 12),
            hidden=tower.get("intermediate_size", 3072),
            tokens=(image // patch) ** 2 + 1,
            projection=config.get("projection_dim", 512),
            patch=patch,
        )


NO_VAE: Numbers = {"decoder_block_out_channels": (1, 1, 1, 1)}
"""Stands for a VAE that is not there: 8 pixels a latent, and next to no work."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of one call: pictures of ``width`` × ``height`` pixels, ``images`` of them, by these networks.

    ``rows`` is how many UNet rows an image takes: 2 with guidance, 1 without. ``encodes`` says that pictures go in.
    ``deep_branch`` is the branch whose deep maps are kept from step to step. ``parameters`` are numbers of parameters
    by component, where they are known better than by arithmetic.
    """

    width: int
    height: int
    images: int = 1
    rows: int = 2
    encodes: bool = False
    deep_branch: int | None = None
    unet: UNetSizes
    vae: VAESizes
    text: tuple[TransformerSizes, ...] = ()
    vision: TransformerSizes | None = None
    parameters: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("width", "height", "images", "rows"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number above 0, not {value!r}")

    @classmethod
    def of(
        cls,
        *,
        unet: Numbers,
        vae: Numbers | None,
        text_encoder: Numbers | None = None,
        text_encoder_2: Numbers | None = None,
        safety_checker: Numbers | None = None,
        **work: Any,
    ) -> Workload:
        """From the components' configs and the work: ``Workload.of(unet=…, vae=…, width=512, height=512, images=4)``.

        Width and height default to the UNet's own sample size. Without a VAE, latents of 8×8 pixels come out.

        Raises:
            ConfigError: lists in a config that do not agree in length.
            InputError: a size, or a number of images or rows, that is not a whole number above 0.
        """
        text = [TransformerSizes.text(text_encoder)] if text_encoder else []
        text += [TransformerSizes.text(text_encoder_2, projected=True)] if text_encoder_2 else []
        autoencoder = VAESizes.of(vae or NO_VAE)
        if vae is None:
            work["parameters"] = {**work.get("parameters", {}), "vae": 0}
        # Only the XL family's autoencoders overflow; the key's default is true for all of them.
        overflows = autoencoder.float32 and unet.get("addition_embed_type") == "text_time"
        native = (unet.get("sample_size") or 64) * autoencoder.factor
        return cls(
            unet=UNetSizes.of(unet),
            vae=replace(autoencoder, float32=overflows),
            text=tuple(text),
            vision=TransformerSizes.vision(safety_checker) if safety_checker else None,
            **{"width": native, "height": native, **work},
        )

    @property
    def latents(self) -> tuple[int, int]:
        """Height and width in latents."""
        return -(-self.height // self.vae.factor), -(-self.width // self.vae.factor)


def depths(kind: str, depth: int | Sequence[int], layers: int) -> Depths:
    """The transformer layers after each of ``layers`` residual blocks of a block of that kind."""
    if "CrossAttn" not in kind:
        return (None,) * layers
    found = (depth,) * layers if isinstance(depth, int) else tuple(depth)
    if len(found) != layers:
        raise ConfigError(f"{layers} residual blocks need {layers} numbers of transformer layers, not {list(found)}")
    return found


def first(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else value[0]


def per_level(value: Any, levels: int) -> tuple[Any, ...]:
    """A value for each level: one for all, or as many as there are levels."""
    if not isinstance(value, (list, tuple)):
        return (value,) * levels
    if len(value) != levels:
        raise ConfigError(f"a UNet of {levels} levels needs {levels} values, not {list(value)}")
    return tuple(value)
