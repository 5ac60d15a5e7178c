"""Checks of prompts and of encoded prompts, which the families share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from russet import validation
from russet.errors import InputError
from russet.families.family import Geometry

Text = str | Sequence[str] | None


def read_prompts(prompt: Text, embeds: Tensor | None) -> tuple[tuple[str, ...] | None, int]:
    """The prompts, None where they come encoded, and how many there are."""
    if (prompt is None) == (embeds is None):
        raise InputError(
            "give either prompt or prompt_embeds, "
            + ("and not both" if prompt is not None else "since nothing says what to generate")
        )
    if prompt is None:
        return None, rows_of(embeds)
    prompts = tuple(validation.texts("prompt", prompt))
    return prompts, len(prompts)


def read_as_many(name: str, value: Text, count: int) -> tuple[str, ...] | None:
    """One text for all prompts or as many as there are; None where none is given."""
    if value is None:
        return None
    if isinstance(value, str):
        return (value,) * count
    texts = validation.texts(name, value)
    if len(texts) != count:
        raise InputError(f"{name} must be one text or {count}, as many as prompts, not {len(texts)}")
    return tuple(texts)


def rows_of(value: Any) -> int:
    return value.shape[0] if isinstance(value, Tensor) and value.dim() > 0 else 1


def check_embeds(
    positive: Tensor | None, negative: Tensor | None, count: int, geometry: Geometry, *, encodes_negative: bool
) -> None:
    """Raises InputError unless encoded prompts [count, N, D] fit the model and each other. N may be any length.

    encodes_negative: whether an encoded text of the usual length is to go with ``positive``.
    """
    if positive is not None:
        validation.tensor("prompt_embeds", positive, (None, None, geometry.features))
        if 0 in positive.shape:
            raise InputError(f"prompt_embeds is empty: its shape is {list(positive.shape)}")
    if negative is not None:
        tokens = positive.shape[1] if positive is not None else geometry.tokens
        validation.tensor("negative_prompt_embeds", negative, (count, tokens, geometry.features))
    elif positive is not None and encodes_negative and positive.shape[1] != geometry.tokens:
        raise InputError(
            f"prompt_embeds has {positive.shape[1]} tokens and an encoded negative prompt {geometry.tokens}: "
            "give negative_prompt_embeds of the same length"
        )
