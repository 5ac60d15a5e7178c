"""Stable Diffusion 1 and 2 (arXiv:2112.10752), and models that were distilled from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from russet import validation
from russet.errors import InputError
from russet.families.family import Family, Geometry, Halves, TextNetworks
from russet.families.prompts import Text, check_embeds, read_as_many, read_prompts
from russet.families.text_encoding import encode_distinct, last_hidden_state


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What to condition on; the fields mean what the arguments of ``StableDiffusionPipeline`` do."""

    prompt: Text = None
    negative_prompt: Text = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    clip_skip: int | None = None


@dataclass(frozen=True, kw_only=True)
class CheckedSDPrompts:
    """Checked prompts: texts, or what they were encoded to, for each half."""

    count: int
    prompts: tuple[str, ...] | None
    negatives: tuple[str, ...] | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    clip_skip: int


class StableDiffusion(Family):
    """Texts by one CLIP encoder, 77 tokens; its last layer, normalised, is the conditioning."""

    @property
    def geometry(self) -> Geometry:
        text = self.component("text_encoder")
        if text is None:
            return self.common_geometry(0, 77)
        return self.common_geometry(text.config.hidden_size, text.config.max_position_embeddings)

    def check(self, prompts: Prompts, *, guided: bool) -> CheckedSDPrompts:
        texts, count = read_prompts(prompts.prompt, prompts.prompt_embeds)
        embeds, negative_embeds = prompts.prompt_embeds, prompts.negative_prompt_embeds
        if prompts.negative_prompt is not None and negative_embeds is not None:
            raise InputError("give either negative_prompt or negative_prompt_embeds, and not both")
        negatives = None
        if negative_embeds is None:
            negatives = read_as_many("negative_prompt", prompts.negative_prompt, count) or ("",) * count
        encoder = self.component("text_encoder")
        check_embeds(embeds, negative_embeds, count, self.geometry, encodes_negative=guided)
        if (encoder is None or self.component("tokenizer") is None) and (
            texts is not None or (guided and negatives is not None)
        ):
            raise InputError(
                "this pipeline has no text encoder or no tokenizer: give prompt_embeds and, for guidance, "
                "negative_prompt_embeds instead of texts"
            )
        layers = 1 if encoder is None else encoder.config.num_hidden_layers
        return CheckedSDPrompts(
            count=count,
            prompts=texts,
            negatives=negatives,
            prompt_embeds=embeds,
            negative_prompt_embeds=negative_embeds,
            clip_skip=validation.integer("clip_skip", prompts.clip_skip or 0, least=0, most=layers - 1),
        )

    def encode(self, prompts: Any, networks: TextNetworks, *, size: tuple[int, int], guided: bool) -> Halves:
        texts = prompts.prompts or ()
        others = (prompts.negatives or ()) if guided else ()
        if prompts.clip_skip == 0:
            encoded = self._encoded((*texts, *others), networks, 0)
        else:  # which is for the prompt alone, as in Diffusers
            encoded = (*self._encoded(texts, networks, prompts.clip_skip), *self._encoded(others, networks, 0))
        positive = torch.stack(encoded[: len(texts)]) if texts else prompts.prompt_embeds
        if not guided:
            return {"encoder_hidden_states": positive}, None
        negative = torch.stack(encoded[len(texts) :]) if others else prompts.negative_prompt_embeds
        return {"encoder_hidden_states": positive}, {"encoder_hidden_states": negative}

    def _encoded(self, texts: tuple[str, ...], networks: TextNetworks, clip_skip: int) -> tuple[Tensor, ...]:
        """[N, D] for each text."""
        if not texts:
            return ()
        tokenizer, encoder = self.component("tokenizer"), self.component("text_encoder")
        with networks.on_device("text_encoder"):
            rows = encode_distinct(
                tokenizer, encoder, texts, last_hidden_state(encoder, clip_skip), clip_skip, networks.text_graphs
            )
        return tuple(hidden for (hidden,) in rows)
