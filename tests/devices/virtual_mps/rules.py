"""What mps refuses, whatever the program: element types, sizes, mixed devices, hasty copies.

The words are torch's own, so that a program which tells errors apart by their text meets what it would on a Mac.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .kernels import Version

NDARRAY_BYTES = 2**32
NDARRAY_ELEMENTS = 2**31

NOT_SUPPORTED = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)


class ProcessAborted(BaseException):
    """On a real Mac the whole process would have died here, from a failed assertion in Apple's frameworks.

    It is no ``Exception``, since no program could have caught it.
    """


class Hazard(RuntimeError):
    """The program did what a real Mac would not refuse but would answer with corrupted values."""


def check_dtype(dtype: torch.dtype, torch_version: Version, macos: Version) -> None:
    """Raises TypeError for element types that mps does not have (PyTorch's documentation of mps, and its source)."""
    if dtype == torch.float64:
        raise TypeError(
            "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
            "Please use float32 instead."
        )
    if dtype == torch.complex128 or dtype in NOT_SUPPORTED:
        raise TypeError(
            f"Trying to convert {str(dtype).removeprefix('torch.')} to the MPS backend but it does not have support "
            "for that dtype."
        )
    if dtype == torch.bfloat16 and torch_version < (2, 3):
        raise TypeError("BFloat16 is not supported on MPS")
    if dtype == torch.bfloat16 and macos < (14,):
        raise TypeError("MPS BFloat16 is only supported on MacOS 14 or newer")


def check_operand(shape: Sequence[int], itemsize: int) -> None:
    """Aborts as Metal does for an operand of a kernel that is too large; memory alone may be (pytorch#149325)."""
    elements = 1
    for size in shape:
        elements *= size
    if elements > NDARRAY_ELEMENTS:
        raise ProcessAborted(
            "failed assertion `[MPSNDArray initWithDevice:descriptor:] Error: product of dimension sizes > 2**31'"
        )
    if elements * itemsize > NDARRAY_BYTES:
        raise ProcessAborted(
            "failed assertion `[MPSNDArray initWithDevice:descriptor:] Error: total bytes of NDArray > 2**32'"
        )


def check_operands(tensors: Iterable[Tensor]) -> None:
    for x in tensors:
        check_operand(x.shape, x.element_size())


def check_same_device(operator: str, tensors: Sequence[Tensor]) -> None:
    """Raises RuntimeError for CPU tensors among those on mps; one without dimensions is a number, and may be."""
    for x in tensors:
        if x.device.type != "mps" and x.dim() > 0:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"mps:0 and {x.device}! (when checking arguments of {operator})"
            )


def no_kernel(operator: str) -> NotImplementedError:
    """What torch raises for an operator that mps does not have."""
    return NotImplementedError(
        f"The operator 'aten::{operator}' is not currently implemented for the MPS device. If you want this op to be "
        "considered for addition please comment on https://github.com/pytorch/pytorch/issues/141287 and mention "
        "use-case, that resulted in missing op. As a temporary fix, you can set the environment variable "
        "`PYTORCH_ENABLE_MPS_FALLBACK=1` to use the CPU as a fallback for this op. WARNING: this will be slower than "
        "running natively on MPS."
    )
