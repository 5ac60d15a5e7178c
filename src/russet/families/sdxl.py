"""Stable Diffusion XL (arXiv:2307.01952): two text encoders, a pooled text, and sizes as conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from russet import validation
from russet.errors import ConfigError, InputError
from russet.families import sd
from russet.families.family import Family, Geometry, Halves, TextNetworks
from russet.families.prompts import Text, check_embeds, read_as_many, read_prompts
from russet.families.text_encoding import Encode, encode_distinct

ENCODERS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))


@dataclass(frozen=True, kw_only=True)
class Prompts(sd.Prompts):
    """What to condition on; the fields mean what the arguments of ``StableDiffusionXLPipeline`` do."""

    prompt_2: Text = None
    negative_prompt_2: Text = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] = (0, 0)
    negative_target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5


@dataclass(frozen=True, kw_only=True)
class CheckedSDXLPrompts:
    """Checked prompts: texts for each encoder, or what they were encoded to, for each half; and the sizes.

    zeros: whether the negative half is zeros, since there is no negative prompt.
    """

    given: Prompts
    count: int
    prompts: tuple[tuple[str, ...], ...] | None
    negatives: tuple[tuple[str, ...], ...] | None
    zeros: bool
    clip_skip: int


class StableDiffusionXL(Family):
    """Texts by two CLIP encoders, their layers before the last side by side; the second one's pooled text; sizes.

    The refiner has the second encoder alone, and takes an aesthetic score in place of the target size.
    """

    callback_tensors: ClassVar = {
        "prompt_embeds": "encoder_hidden_states",
        "add_text_embeds": "text_embeds",
        "add_time_ids": "time_ids",
    }

    @property
    def encoders(self) -> list[tuple[Any, Any, str]]:
        """Tokenizer, text encoder and its name, of those that there are."""
        found = [(self.component(tokenizer), self.component(name), name) for tokenizer, name in ENCODERS]
        return [pair for pair in found if pair[0] is not None and pair[1] is not None]

    @property
    def geometry(self) -> Geometry:
        encoders = [encoder for _, encoder, _ in self.encoders]
        features = sum(encoder.config.hidden_size for encoder in encoders)
        tokens = encoders[0].config.max_position_embeddings if encoders else 77
        return self.common_geometry(features, tokens)

    @property
    def scores(self) -> bool:
        """Whether the UNet takes an aesthetic score in place of the target size: five numbers and not six."""
        config = self.component("unet").config
        second = self.component("text_encoder_2")
        pooled = 1280 if second is None else second.config.projection_dim
        numbers = ((config.projection_class_embeddings_input_dim or 0) - pooled) / (config.addition_time_embed_dim or 1)
        if numbers not in (5, 6):
            raise ConfigError(
                f"the UNet takes {numbers:g} numbers for sizes beside a pooled text of {pooled} features: "
                "an XL model takes 6, and its refiner 5"
            )
        return numbers == 5

    def check(self, prompts: Prompts, *, guided: bool) -> CheckedSDXLPrompts:
        texts, count = read_prompts(prompts.prompt, prompts.prompt_embeds)
        geometry, negative_embeds = self.geometry, prompts.negative_prompt_embeds
        given = {"prompt_2": prompts.prompt_2, "negative_prompt_2": prompts.negative_prompt_2}
        if prompts.prompt_embeds is not None and prompts.prompt_2 is not None:
            raise InputError("give either prompt_2 or prompt_embeds, and not both")
        if negative_embeds is not None and (prompts.negative_prompt, prompts.negative_prompt_2) != (None, None):
            raise InputError(
                "give either negative_prompt and negative_prompt_2 or negative_prompt_embeds, and not both"
            )
        second = read_as_many("prompt_2", given["prompt_2"], count) or texts
        negative = read_as_many("negative_prompt", prompts.negative_prompt, count)
        zeros = (
            prompts.negative_prompt is None
            and negative_embeds is None
            and bool(self.options.get("force_zeros_for_empty_prompt", True))
        )
        negative = negative or ("",) * count
        negative_2 = read_as_many("negative_prompt_2", given["negative_prompt_2"], count) or negative
        encodes_negative = guided and negative_embeds is None and not zeros
        check_embeds(prompts.prompt_embeds, negative_embeds, count, geometry, encodes_negative=encodes_negative)
        self._check_pooled(prompts, count)
        if (texts is not None or encodes_negative) and not self.encoders:
            raise InputError("this pipeline has no text encoder: give prompt_embeds and pooled_prompt_embeds")
        check_sizes(prompts)
        layers = min((encoder.config.num_hidden_layers for _, encoder, _ in self.encoders), default=2)
        return CheckedSDXLPrompts(
            given=prompts,
            count=count,
            prompts=None if texts is None else self._per_encoder(texts, second or texts),
            negatives=self._per_encoder(negative, negative_2) if encodes_negative else None,
            zeros=zeros,
            clip_skip=validation.integer("clip_skip", prompts.clip_skip or 0, least=0, most=layers - 1),
        )

    def _per_encoder(self, first: tuple[str, ...], second: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        """The texts for each encoder. A single one reads the first, as in Diffusers."""
        return (first, second)[: len(self.encoders)]

    def _check_pooled(self, prompts: Prompts, count: int) -> None:
        for name, embeds, pooled in (
            ("pooled_prompt_embeds", prompts.prompt_embeds, prompts.pooled_prompt_embeds),
            ("negative_pooled_prompt_embeds", prompts.negative_prompt_embeds, prompts.negative_pooled_prompt_embeds),
        ):
            if embeds is not None and pooled is None:
                raise InputError(f"{name} is missing: encoded prompts come with the pooled text of the second encoder")
            if pooled is not None:
                validation.tensor(name, pooled, (count, None))

    def encode(self, prompts: Any, networks: TextNetworks, *, size: tuple[int, int], guided: bool) -> Halves:
        given: Prompts = prompts.given
        context, pooled = given.prompt_embeds, given.pooled_prompt_embeds
        if prompts.prompts is not None:
            context, made = self._encoded(prompts.prompts, networks, prompts.clip_skip)
            pooled = made if pooled is None else pooled
        assert context is not None
        assert pooled is not None
        ids, negative_ids = self._time_ids(given, size)
        positive = {
            "encoder_hidden_states": context,
            "text_embeds": pooled,
            "time_ids": context.new_tensor(ids, dtype=torch.float32).expand(prompts.count, -1),
        }
        if not guided:
            return positive, None
        negative, negative_pooled = given.negative_prompt_embeds, given.negative_pooled_prompt_embeds
        if prompts.negatives is not None:
            negative, made = self._encoded(prompts.negatives, networks, 0)
            negative_pooled = made if negative_pooled is None else negative_pooled
        elif prompts.zeros:
            negative, negative_pooled = torch.zeros_like(context), torch.zeros_like(pooled)
        assert negative is not None
        assert negative_pooled is not None
        return positive, {
            "encoder_hidden_states": negative,
            "text_embeds": negative_pooled,
            "time_ids": context.new_tensor(negative_ids, dtype=torch.float32).expand(prompts.count, -1),
        }

    def _encoded(
        self, texts: Sequence[tuple[str, ...]], networks: TextNetworks, clip_skip: int
    ) -> tuple[Tensor, Tensor | None]:
        """[count, N, D] and the pooled text [count, P] of the encoder that has a projection."""
        contexts, pooled = [], None
        for (tokenizer, encoder, name), some in zip(self.encoders, texts, strict=True):
            with networks.on_device(name):
                rows = encode_distinct(
                    tokenizer, encoder, some, penultimate(encoder, clip_skip), clip_skip, networks.text_graphs
                )
            hidden, *ends = (torch.stack(column) for column in zip(*rows, strict=True))
            contexts.append(hidden)
            pooled = ends[0] if ends else pooled
        return torch.cat(contexts, dim=-1), pooled

    def _time_ids(self, given: Prompts, size: tuple[int, int]) -> tuple[list[float], list[float]]:
        """The numbers for sizes and crops, in pixels, of the prompts and of the negative prompts."""
        original, target = given.original_size or size, given.target_size or size
        crop = given.crops_coords_top_left
        if self.scores:
            negative_original = given.negative_original_size or original
            return [*original, *crop, given.aesthetic_score], [
                *negative_original,
                *given.negative_crops_coords_top_left,
                given.negative_aesthetic_score,
            ]
        usual: list[float] = [*original, *crop, *target]
        return usual, self._negative_ids(given, usual)

    def _negative_ids(self, given: Prompts, usual: list[float]) -> list[float]:
        if given.negative_original_size is None or given.negative_target_size is None:
            return usual
        return [*given.negative_original_size, *given.negative_crops_coords_top_left, *given.negative_target_size]


def penultimate(encoder: Any, clip_skip: int) -> Encode:
    """The layer before the last, or one that many layers before it, not normalised; and the projected end, if any."""

    def encode(ids: Tensor) -> tuple[Tensor, ...]:
        output = encoder(ids, output_hidden_states=True)
        hidden = output.hidden_states[-2 - clip_skip]
        pooled = getattr(output, "text_embeds", None)
        return (hidden,) if pooled is None else (hidden, pooled)

    return encode


def check_sizes(prompts: Prompts) -> None:
    """Raises InputError unless sizes and crops are pairs of whole numbers, and the scores numbers."""
    for name in ("original_size", "target_size", "negative_original_size", "negative_target_size"):
        check_pair(name, getattr(prompts, name), least=1, optional=True)
    for name in ("crops_coords_top_left", "negative_crops_coords_top_left"):
        check_pair(name, getattr(prompts, name), least=0)
    for name in ("aesthetic_score", "negative_aesthetic_score"):
        validation.number(name, getattr(prompts, name))


def check_pair(name: str, value: Any, *, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise InputError(
            f"{name} must be two numbers, of height or top and width or left, not {validation.shown(value)}"
        )
    for one in value:
        validation.integer(name, one, least=least)
