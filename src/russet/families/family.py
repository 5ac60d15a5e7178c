"""What a model family is: its components' sizes, its prompts, and the conditioning that it makes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from russet.backends.cuda.graphs import Graphs
from russet.errors import ConfigError
from russet.planning.workload import Workload

Rows = Mapping[str, Tensor]
Halves = tuple[Rows, "Rows | None"]
"""Conditioning by the names of the UNet's arguments, one row per prompt: of the prompts, and of the negative ones."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What the components' configs say about sizes: a spec is checked against it.

    sample: the default height and width of latents. channels: of the latents. factor: pixels per latent along an edge.
    features: D of the text conditioning. tokens: N. distilled: whether the UNet takes the guidance scale as an input
    and is called once a step. decodes: whether there is a VAE.
    """

    sample: tuple[int, int]
    channels: int
    factor: int
    features: int
    tokens: int
    distilled: bool = False
    decodes: bool = True


class CheckedPrompts(Protocol):
    """Prompts that a family has checked."""

    @property
    def count(self) -> int:
        """How many prompts there are."""


class TextNetworks(Protocol):
    """The text encoders while a run has them."""

    def on_device(self, component: str) -> AbstractContextManager[Any]:
        """The network is on its device, and this run's alone, until the block ends."""

    @property
    def text_graphs(self) -> Graphs | None:
        """Where calls of text encoders are recorded; None where they are not."""


class Family(ABC):
    """One model family.

    Args:
        component: gives a component by name, its weights in memory or not; None where it was left out.
        options: what the checkpoint's ``model_index.json`` says beside the components.
    """

    callback_tensors: ClassVar[Mapping[str, str]] = {"prompt_embeds": "encoder_hidden_states"}
    """What callbacks call the conditioning's tensors."""

    def __init__(self, component: Callable[[str], Any], options: Mapping[str, Any] | None = None) -> None:
        self.component = component
        self.options = options or {}

    @property
    @abstractmethod
    def geometry(self) -> Geometry:
        """Raises ConfigError where the components do not fit each other."""

    @abstractmethod
    def check(self, prompts: Any, *, guided: bool) -> CheckedPrompts:
        """The prompts of a call, checked.

        Raises:
            InputError, ArgumentTypeError: they are wrong, or do not fit the components.
        """

    @abstractmethod
    def encode(self, prompts: Any, networks: TextNetworks, *, size: tuple[int, int], guided: bool) -> Halves:
        """Checked prompts → conditioning. size: the pictures' height and width in pixels."""

    def workload(self, **work: Any) -> Workload:
        """The numbers that a plan is made from; ``work`` are the fields of ``Workload`` that say what is asked for."""
        names = ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker")
        configs = {name: getattr(self.component(name), "config", None) for name in names}
        given = {name: config for name, config in configs.items() if config is not None}
        return Workload.of(**{"vae": None, **given}, **work)

    def common_geometry(self, features: int, tokens: int) -> Geometry:
        """The geometry of a UNet and a VAE whose latents it denoises."""
        unet, vae = self.component("unet").config, self.component("vae")
        if vae is not None and unet.in_channels != vae.config.latent_channels:
            raise ConfigError(
                f"the UNet takes {unet.in_channels} channels and the VAE's latents have {vae.config.latent_channels}: "
                "this is no text-to-image model (9 channels are for inpainting, 8 for editing by instruction)"
            )
        width = unet.cross_attention_dim
        width = width if isinstance(width, int) else width[0]
        if features and features != width:
            raise ConfigError(f"the UNet takes text of {width} features and the text encoder gives {features}")
        sample = unet.sample_size if isinstance(unet.sample_size, tuple) else (unet.sample_size or 64,) * 2
        return Geometry(
            sample=(sample[0], sample[1]),
            channels=unet.in_channels,
            factor=8 if vae is None else vae.config.pixels_per_latent,
            features=width,
            tokens=tokens,
            distilled=unet.time_cond_proj_dim is not None,
            decodes=vae is not None,
        )
