"""What a callback is shown after a step, and what it may change."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from russet import validation
from russet.errors import ArgumentTypeError, InputError
from russet.generate.conditioning import Conditioning

HALF = "negative_"  # begins the name of the negative half of a tensor


def shown_tensors(
    names: Sequence[str], known: Mapping[str, str], conditioning: Conditioning, latents: Tensor, x0: Tensor
) -> dict[str, Tensor | None]:
    """The tensors that a callback asked for. ``known``: what it calls the conditioning's tensors.

    Those of the conditioning have both halves, [2B, …] with the negative one first, or [B, …] without guidance.
    """
    shown: dict[str, Tensor | None] = {}
    joined = functools.cache(lambda: conditioning.joined)
    for name in names:
        if name == "latents":
            shown[name] = latents
        elif name == "pred_original_sample":
            shown[name] = x0
        elif name in known:
            shown[name] = joined()[known[name]]
        else:
            shown[name] = (conditioning.negative or {}).get(known[name.removeprefix(HALF)])
    return shown


def read_answer(given: Any, shown: Mapping[str, Tensor | None], names: Sequence[str]) -> dict[str, Tensor]:
    """What a callback changed: the tensors of its answer that are not the ones it was shown."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ArgumentTypeError(f"callback_on_step_end must return a dict or None, not {validation.shown(given)}")
    for name in given:
        validation.one_of("the names that callback_on_step_end returns", name, names)
    changed = {name: tensor for name, tensor in given.items() if tensor is not shown.get(name)}
    if "pred_original_sample" in changed:
        raise InputError("pred_original_sample is only shown: callback_on_step_end may change latents instead")
    return changed


def reconditioned(before: Conditioning, changed: Mapping[str, Tensor], known: Mapping[str, str]) -> Conditioning:
    """The conditioning after a callback. A tensor has both halves, negative first, or only the positive one.

    One that has only the positive half switches guidance off.
    """
    after = before
    for name, argument in known.items():
        positive = after.positive[argument]
        negative = None if after.negative is None else after.negative[argument]
        images, *rest = positive.shape
        if (joined := changed.get(name)) is not None:
            both = isinstance(joined, Tensor) and len(joined) == 2 * images
            validation.tensor(f"{name} from callback_on_step_end", joined, (2 * images if both else images, *rest))
            negative, positive = joined.to(positive).chunk(2) if both else (None, joined.to(positive))
            after = after.with_halves(argument, positive, negative)
        if (alone := changed.get(HALF + name)) is not None:
            validation.tensor(f"{HALF}{name} from callback_on_step_end", alone, tuple(positive.shape))
            after = after.with_halves(argument, positive, alone.to(positive))
    halved = any(name in changed and len(changed[name]) == len(before) for name in known)
    return after.without_negative if halved and not any(HALF + name in changed for name in known) else after


def as_tensor(t: float) -> Tensor:
    """A timestep as callbacks know it: a tensor without dimensions, of whole numbers where it is one."""
    return torch.tensor(int(t) if float(t).is_integer() else t, device="cpu")


def read_latents(given: Any, like: Tensor) -> Tensor:
    """Latents that a callback gave in place of those it was shown."""
    return validation.tensor("latents from callback_on_step_end", given, tuple(like.shape)).to(like)
