"""Launches of Triton's kernels written down, as far as what is compiled depends on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import triton
from torch import Tensor


@contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[dict[str, Any]]]:
    """Has launches of the modules' kernels written down instead of made, while the block lasts."""
    launches: list[dict[str, Any]] = []

    def shadow(kernel: Any) -> None:
        def run(*arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
            launches.append(described(kernel, arguments, constants))

        kernel.run = run

    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, triton.JITFunction)]
    try:
        for kernel in kernels:
            shadow(kernel)
        yield launches
    finally:
        for kernel in kernels:
            vars(kernel).pop("run", None)


def described(kernel: Any, arguments: Sequence[Any], constants: dict[str, Any]) -> dict[str, Any]:
    """A launch, as far as what is compiled depends on it."""
    return {
        "module": kernel.__module__,
        "kernel": kernel.__name__,
        "arguments": [told(value) for value in arguments],
        "constants": constants,
    }


def told(value: Any) -> Any:
    """An argument in plain data: of tensors the dtype, of their descriptions the sizes too."""
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype), "itemsize": value.element_size()}
    if hasattr(value, "block_shape"):  # a tensor's description
        sizes = {"shape": list(value.shape), "strides": list(value.strides), "block": list(value.block_shape)}
        return {**told(value.base), **sizes}
    return value
