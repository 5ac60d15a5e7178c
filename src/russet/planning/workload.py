"""How large the work of one call is: its images and the configs of the networks, known before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from russet.errors import InputError
from russet.models.clip_text import CLIPTextConfig
from russet.models.clip_vision import CLIPVisionConfig
from russet.models.safety_checker import SafetyCheckerConfig
from russet.models.tiny_vae import TinyVAEConfig
from russet.models.unet_config import UNetConfig
from russet.models.vae_config import VAEConfig

Numbers = Mapping[str, Any]

NO_VAE: Numbers = {"decoder_block_out_channels": (1, 1, 1, 1), "encoder_block_out_channels": (1, 1, 1, 1)}
"""Stands for a VAE that is not there: 8 pixels a latent, and next to no work."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of one call: ``images`` pictures of ``width`` × ``height`` pixels, by these networks.

    Attributes:
        rows: UNet rows of an image: 2 with guidance, 1 without.
        encodes: whether pictures go in, so that the VAE encodes them.
        deep_branch: the branch whose deep feature maps are kept from step to step (DeepCache); None without it.
        vision: the safety checker's vision tower.
        parameters: number of parameters by component; both text encoders together are "text_encoder". A component that
            is not named has none.
    """

    width: int
    height: int
    images: int = 1
    rows: int = 2
    encodes: bool = False
    deep_branch: int | None = None
    unet: UNetConfig
    vae: VAEConfig | TinyVAEConfig
    text: tuple[CLIPTextConfig, ...] = ()
    vision: CLIPVisionConfig | None = None
    parameters: Mapping[str, int]

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
        parameters: Mapping[str, int] | None = None,
        **work: Any,
    ) -> Workload:
        """From the networks' configs and the work: ``Workload.of(unet=…, vae=…, width=512, height=512, images=4)``.

        Width and height default to the UNet's own sample size; ``parameters`` are counted from the configs if left out.
        Without a VAE, latents of 8×8 pixels come out.

        Raises:
            ConfigError: a config of a network that Russet cannot build.
            InputError: a size, or a number of images or rows, that is not a whole number above 0.
        """
        unet_config = UNetConfig.of(unet, {})
        decodes, vae = vae is not None, NO_VAE if vae is None else vae
        tiny = isinstance(vae, TinyVAEConfig) or "decoder_block_out_channels" in vae
        vae_config = TinyVAEConfig.of(vae, {}) if tiny else VAEConfig.of(vae, {})
        text = [CLIPTextConfig.of(config, {}) for config in (text_encoder, text_encoder_2) if config]
        checker = SafetyCheckerConfig.of(safety_checker, {}) if safety_checker else None
        if parameters is None:
            from russet.planning import parameter_counts

            parameters = {
                "unet": parameter_counts.unet(unet_config),
                "vae": parameter_counts.vae(vae_config),
                "text_encoder": sum(parameter_counts.text_encoder(one, place > 0) for place, one in enumerate(text)),
                "safety_checker": 0 if checker is None else parameter_counts.safety_checker(checker),
            }
        elif "text_encoder_2" in parameters:
            both = sum(parameters.get(name, 0) for name in ("text_encoder", "text_encoder_2"))
            parameters = {**parameters, "text_encoder": both}
        if not decodes:
            parameters = {**parameters, "vae": 0}
        sample = unet_config.sample_size or 64
        high, wide = sample if isinstance(sample, tuple) else (sample, sample)
        factor = vae_config.pixels_per_latent
        return cls(
            unet=unet_config,
            vae=vae_config,
            text=tuple(text),
            vision=None if checker is None else checker.vision,
            parameters=parameters,
            **{"width": wide * factor, "height": high * factor, **work},
        )

    @property
    def latents(self) -> tuple[int, int]:
        """Height and width in latents."""
        factor = self.vae.pixels_per_latent
        return -(-self.height // factor), -(-self.width // factor)

    @property
    def vae_overflows(self) -> bool:
        """Whether float16 overflows in the VAE: in the XL family's alone, though their config key defaults to true."""
        return self.vae.force_upcast and self.unet.addition_embed_type == "text_time"

    @property
    def text_features(self) -> int:
        """Features of the text that the UNet attends to."""
        return self.unet.text_features or 0
