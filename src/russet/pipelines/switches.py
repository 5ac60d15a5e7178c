"""The switches that users of Diffusers know. Each records a choice, which wins over the plan and is listed in it.

None of them is needed: without them the plan decides.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from russet import validation
from russet.errors import ArgumentTypeError
from russet.generate.deep_cache import DeepCache
from russet.residency.pipeline import MovesNetworks


class Switches(MovesNetworks):
    """What a pipeline can be told by hand about attention, the VAE, step caching and progress."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: dict[str, Any] = {}
        self.deep_cache: DeepCache | None = None

    def known(self, name: str) -> Any:
        """A component, its weights loaded or not; None where it was left out."""
        return vars(self).get(name)

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Computes attention for some of the heads at a time, exactly and on any torch.

        slice_size: "auto" for half of the heads, "max" for one at a time, a number of heads, or None to switch it off.

        Raises:
            InputError: another value.
        """
        self._choose(attention_slicing="off" if slice_size is None else slice_size)

    def disable_attention_slicing(self) -> None:
        """Computes attention for all heads at once, even where the plan would have split it."""
        self._choose(attention_slicing="off")

    def enable_vae_slicing(self) -> None:
        """Decodes one picture of a batch at a time."""
        self._choose(vae_slicing=True)

    def disable_vae_slicing(self) -> None:
        """Decodes as many pictures of a batch at once as the plan allows."""
        self._choose(vae_slicing=None)

    def enable_vae_tiling(self) -> None:
        """Decodes large pictures in overlapping tiles, which need less memory."""
        self._choose(vae_tiling=True)

    def disable_vae_tiling(self) -> None:
        """Decodes each picture as a whole, whatever it needs."""
        self._choose(vae_tiling=False)

    def enable_fast_paths(self) -> None:
        """Lets the plan choose optimisations of networks again: the default."""
        self._choose(fast_paths=None)

    def disable_fast_paths(self) -> None:
        """Computes without optimisations of networks, by PyTorch's own operations: to find what causes a difference."""
        self._choose(fast_paths=False)

    def enable_deep_cache(self, interval: int = 2, branch: int = 0, start: float = 0.4) -> None:
        """Computes the whole UNet in every ``interval``-th call only, and its outermost blocks in all others.

        Less work, and slightly other pictures (DeepCache, arXiv:2312.00858); the page on speed has figures.

        Args:
            interval: of so many calls in a row one is whole; 1 draws what would be drawn without this.
            branch: the innermost skip connection that is computed in the other calls; 0 is the outermost, the cheapest.
            start: the part of the noise schedule, 0..1, in which every call is whole. The layout is made there: with 0
                more work is saved, and another picture comes out.

        Raises:
            InputError: an interval below 1, a branch that the UNet does not have, a start outside of 0..1.
        """
        most = len(self.known("unet").output_stages) - 2
        self.deep_cache = DeepCache(
            validation.integer("interval", interval, least=1),
            validation.integer("branch", branch, least=0, most=most),
            validation.number("start", start, least=0.0, most=1.0),
        )

    def disable_deep_cache(self) -> None:
        """Computes the whole UNet in every call again."""
        self.deep_cache = None

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for tqdm's bar over the steps, ``disable=True`` among them."""
        self._progress = options

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """The bar that shows the steps of a call: a tqdm over ``iterable`` or with ``total`` steps."""
        from tqdm.auto import tqdm

        if (iterable is None) == (total is None):
            raise ArgumentTypeError("progress_bar takes either an iterable or a total")
        options = self._progress
        if sys.stderr is None and options.get("file") is None:  # as under pythonw: there is nothing to write to
            options = {**options, "disable": True}
        return tqdm(iterable, total=total, **options)
