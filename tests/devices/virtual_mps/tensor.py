"""The tensor that says ``mps`` and holds its values on the CPU."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .machine import VirtualMac

MPS = torch.device("mps:0")


class VirtualTensor(Tensor):
    """A tensor on a virtual Mac's GPU.

    ``host`` is an ordinary CPU tensor of the same shape and strides, with the numbers (on ``meta``, so without
    any, if the Mac computes shapes only); views share its storage. ``mac`` is the machine, ``buffer`` keeps the
    storage's bytes accounted for as long as any tensor uses them.
    """

    host: Tensor
    mac: VirtualMac

    @staticmethod
    def __new__(cls, host: Tensor, mac: VirtualMac) -> VirtualTensor:
        mac.check_dtype(host.dtype)
        self = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=MPS,
        )
        self.adopt(host, mac)
        return self

    def adopt(self, host: Tensor, mac: VirtualMac) -> None:
        """Takes other values in place of its own; shape and strides are the caller's business."""
        self.host, self.mac = host, mac
        self.buffer = mac.account.hold(storage_of(host))

    # No detour over __torch_function__: the function mode of virtual_mps.functions sees every call anyway.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mac = next(x.mac for x in tensors_in(args, kwargs or {}) if isinstance(x, VirtualTensor))
        return mac.operators.run(func, args, kwargs or {})

    # What Python itself asks of a value waits for the device. These are not operators, and torch refuses them to
    # tensor subclasses, or guards them with the device's own code, which is not part of this torch.
    def __repr__(self, *, tensor_contents: None = None) -> str:
        self.mac.account.sync("print")
        return f"{self.host!r:.300} on {self.mac.name}"

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __complex__(self) -> complex:
        return complex(self.item())

    def __index__(self) -> int:
        return operator.index(self.item())

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else format(repr(self), spec)

    def __contains__(self, value: Any) -> bool:
        return bool((self == value).any().item())

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            "can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, requires_grad=self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().__reduce_ex__(protocol)

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return storage_of(self.host)


def storage_of(x: Tensor) -> Any:
    """The bytes behind a tensor, without a dtype; torch before 2.0 calls them otherwise."""
    return x.untyped_storage() if hasattr(x, "untyped_storage") else x.storage().untyped()


def tensors_in(*trees: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    found: list[Tensor] = []
    for tree in trees:
        if isinstance(tree, Tensor):
            found.append(tree)
        elif isinstance(tree, (list, tuple)):
            found += tensors_in(*tree)
        elif isinstance(tree, dict):
            found += tensors_in(*tree.values())
    return found


def mapped(change: Any, tree: Any) -> Any:
    """``tree`` with ``change`` applied to every tensor in its nested lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, (list, tuple)):
        items = [mapped(change, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {key: mapped(change, item) for key, item in tree.items()}
    return tree
