"""The numbers of a schedule as programs with a loop of their own index them: ``scheduler.sigmas[i] * latents``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class ScheduleTensor(Tensor):
    """A tensor [N] on the CPU, each of whose elements is a plain tensor with a storage of its own.

    An element of an ordinary tensor is a view. Multiplied with a tensor on mps it counts as the first number of its
    storage before torch 2.14 (pytorch#193057); a copy counts as what it is.

    A part of a ``ScheduleTensor`` is one too, and so is what is computed from it, as long as it is [N] and on the CPU.
    Everything else is a plain tensor, so that latents stay what they are.
    """

    @classmethod
    def of(cls, x: Tensor) -> Tensor:
        """``x`` [N] as a ``ScheduleTensor``, and anything else as it is; an element as a copy."""
        if type(x) is not Tensor or x.device.type != "cpu" or x.dim() > 1 or x.requires_grad:
            return x
        # as_subclass fails under a dispatch mode of torch 1.13
        return x.clone() if x.dim() == 0 else Tensor._make_subclass(cls, x)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # torch's own way to run a function without this method
        out = torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        if isinstance(out, Tensor):
            return cls.of(out)
        if isinstance(out, (tuple, list)):
            return type(out)([cls.of(x) if isinstance(x, Tensor) else x for x in out])
        return out

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind(0))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = memo.setdefault(id(self), self.detach().clone())
        return copied
