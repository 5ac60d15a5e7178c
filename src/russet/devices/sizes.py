"""How large the work is, in plain numbers: read from config mappings, so that it is known before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from russet.errors import ConfigError, InputError

Numbers = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class UNetSizes:
    """The conditional UNet's shape, one entry per level from the finest down.

    ``depth`` is the number of transformer layers in each attention block of a level, 0 where the level has none.
    """

    channels: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    depth: tuple[int, ...]
    up_depth: tuple[int, ...]  # from the finest level down as well
    mid_depth: int
    context: int
    in_channels: int = 4
    out_channels: int = 4
    added: int = 0  # width of the added embedding's input, 0 without one

    @classmethod
    def of(cls, config: Numbers) -> UNetSizes:
        channels = tuple(config.get("block_out_channels") or (320, 640, 1280, 1280))
        levels = len(channels)
        attending = [
            "Attn" in kind
            for kind in config.get("down_block_types") or ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]
        ]
        attending_up = [
            "Attn" in kind
            for kind in config.get("up_block_types") or ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1)
        ]
        depth = per_level(config.get("transformer_layers_per_block", 1), levels)
        has_mid = config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None
        return cls(
            channels=channels,
            layers=per_level(config.get("layers_per_block", 2), levels),
            # the checkpoints' attention_head_dim is the number of heads, for historical reasons
            heads=per_level(config.get("num_attention_heads") or config.get("attention_head_dim", 8), levels),
            depth=tuple(n if attends else 0 for n, attends in zip(depth, attending, strict=True)),
            up_depth=tuple(n if attends else 0 for n, attends in zip(depth, reversed(attending_up), strict=True)),
            mid_depth=depth[-1] if has_mid else 0,
            context=per_level(config.get("cross_attention_dim", 1280), levels)[0],
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            added=config.get("projection_class_embeddings_input_dim") or 0,
        )


@dataclass(frozen=True, kw_only=True)
class VAESizes:
    """The autoencoder's shape; ``float32`` where its config says that float16 overflows in it."""

    channels: tuple[int, ...]
    layers: int
    latent: int = 4
    float32: bool = False

    @classmethod
    def of(cls, config: Numbers) -> VAESizes:
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


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The work of one call: pictures of ``width`` × ``height`` pixels, ``images`` of them, by these networks.

    ``rows`` is how many UNet rows an image takes: 2 with guidance, 1 without. ``encodes`` says that pictures go in.
    ``parameters`` are numbers of parameters by component, where they are known better than by arithmetic.
    """

    width: int
    height: int
    images: int = 1
    rows: int = 2
    encodes: bool = False
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
        vae: Numbers,
        text_encoder: Numbers | None = None,
        text_encoder_2: Numbers | None = None,
        safety_checker: Numbers | None = None,
        **work: Any,
    ) -> Sizes:
        """From the components' configs and the work: ``Sizes.of(unet=…, vae=…, width=512, height=512, images=4)``.

        Width and height default to the UNet's own sample size.

        Raises:
            ConfigError: lists in a config that do not agree in length.
            InputError: a size, or a number of images or rows, that is not a whole number above 0.
        """
        text = [TransformerSizes.text(text_encoder)] if text_encoder else []
        text += [TransformerSizes.text(text_encoder_2, projected=True)] if text_encoder_2 else []
        autoencoder = VAESizes.of(vae)
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


def per_level(value: int | Sequence[int], levels: int) -> tuple[int, ...]:
    """A number for each level: one for all, or as many as there are levels; of nested lists, the first."""
    if isinstance(value, int):
        return (value,) * levels
    numbers = tuple(max(item) if isinstance(item, (list, tuple)) else item for item in value)
    if len(numbers) != levels:
        raise ConfigError(f"a UNet of {levels} levels needs {levels} numbers, not {list(numbers)}")
    return numbers
