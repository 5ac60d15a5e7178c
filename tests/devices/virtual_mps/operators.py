"""Operators on the virtual device: each is checked, computed on the CPU, spoiled where the Mac would, and counted.

``Operators`` is the dispatch mode that is active on a virtual Mac, and sees every operator that torch's dispatcher
sees, one level below autograd. That of the tensors' own ``__torch_dispatch__`` ends here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import defects, kernels, rules
from .schema import ANY_DEVICE, HALF, INDEXING, PRODUCTS, UNINITIALISED, WAITS, Operator
from .streams import check_generator, device_stream
from .tensor import VirtualTensor, mapped, tensors_in

if TYPE_CHECKING:
    from .machine import VirtualMac


class Operators(TorchDispatchMode):
    """Runs operators for one virtual Mac; those that touch no tensor of it and make none pass through."""

    def __init__(self, mac: VirtualMac) -> None:
        super().__init__()
        self.mac = mac

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps the mode, and the first operator imports torch.compile, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = tensors_in(args, kwargs)
        target = kwargs.get("device")
        makes = target is not None and torch.device(target).type == "mps"
        if not makes and not any(isinstance(x, VirtualTensor) for x in tensors):
            check_generator(kwargs.get("generator"), "cpu")
            return func(*args, **kwargs)
        self.mac.require_active()
        op = Operator.of(func)
        special = SPECIAL.get(op.base)
        if special is not None:
            return special(self, op, args, kwargs)
        status = self.status(op)
        if status == kernels.IMPLICIT:  # inference mode shows them; torch takes them apart
            with self:
                return func._op_dk(torch.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if op.base not in ANY_DEVICE and target is None:  # with a device, arguments only lend their shape
            rules.check_same_device(op.name, tensors)
        if status is None:
            raise rules.no_kernel(op.name)
        return self.view(op, args, kwargs) if op.is_view else self.kernel(op, args, kwargs, tensors)

    def status(self, op: Operator) -> str | None:
        return kernels.status(op.name, self.mac.torch) if op.namespace == "aten" else None

    def view(self, op: Operator, args: Any, kwargs: Any) -> Any:
        self.mac.account.view(op.base)
        out = op.func(*mapped(self.mac.to_host, args), **mapped(self.mac.to_host, kwargs))
        return self.wrap(op, out, args, kwargs)

    def kernel(self, op: Operator, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """An operator that computes: the checks before it, the numbers, the defects, the accounts."""
        mac = self.mac
        bound = op.bind(args, kwargs)
        rules.check_operands(tensors)
        defects.check_one_precision(mac, op.base, tensors)
        self.check_result(op, bound)
        if op.base in INDEXING:
            self.charge_indices(bound)
        if op.base in WAITS or (op.name == "repeat_interleave.Tensor" and bound["output_size"] is None):
            mac.account.sync(op.base)
        spoils = [] if mac.shapes_only else defects.spoilers(mac, op.base, bound)
        out = self.compute(op, *defects.seen(mac, op.base, (args, kwargs)))
        for spoil in spoils:
            spoil(out[0] if isinstance(out, tuple) else out)
        if op.base == "native_group_norm" and mac.has("slow-group-norm"):
            self.charge_decomposed_norm(bound["input"])
        else:
            mac.account.kernel(op.base)
        rules.check_operands(tensors_in(out))
        return self.wrap(op, out, args, kwargs)

    def compute(self, op: Operator, args: Any, kwargs: Any) -> Any:
        """The numbers, on the CPU; random ones come from the device's own stream."""
        mac = self.mac
        kwargs = {**mapped(mac.to_host, kwargs), **({"device": mac.host} if kwargs.get("device") is not None else {})}
        args = mapped(mac.to_host, args)
        if mac.shapes_only:
            kwargs.pop("generator", None)
            return mac.shapes.run(op.func, args, kwargs)
        if op.base in PRODUCTS and any(x.dtype in HALF for x in tensors_in(args)) and "out" not in kwargs:
            return half_by_float32(op, args, kwargs)
        if not op.is_random:
            return computed(op, args, kwargs)
        with device_stream(mac, kwargs.get("generator")):
            return op.func(*args, **kwargs)

    def check_result(self, op: Operator, bound: dict[str, Any]) -> None:
        """Refuses results that would be too large, before the CPU spends its memory on them.

        Uninitialised memory is no operand of a kernel yet, and may be larger than one.
        """
        if op.base in ("mm", "addmm", "bmm", "baddbmm"):
            left = bound.get("mat1", bound.get("batch1", bound["self"]))
            right = bound.get("mat2", bound.get("batch2"))
            shape, itemsize = (*left.shape[:-1], right.shape[-1]), left.element_size()
        elif op.base == "linear":
            shape, itemsize = (*bound["input"].shape[:-1], bound["weight"].shape[0]), bound["input"].element_size()
        elif isinstance(bound.get("size"), (list, tuple)) and "device" in bound:
            implied = bound["self"].dtype if "self" in bound else torch.get_default_dtype()
            dtype = bound["dtype"] if isinstance(bound.get("dtype"), torch.dtype) else implied
            self.mac.check_dtype(dtype)
            shape, itemsize = tuple(bound["size"]), bytes_of(dtype)
        else:
            return
        if op.base not in UNINITIALISED:
            rules.check_operand(shape, itemsize)
        self.mac.account.check(math.prod(shape) * itemsize)

    def charge_indices(self, bound: dict[str, Any]) -> None:
        """Indices on the CPU are copied to the device; masks are turned into positions, whose number the host needs."""
        for index in tensors_in(bound["indices"]):
            if not isinstance(index, VirtualTensor):
                self.mac.account.sync("upload")
            if index.dtype in (torch.bool, torch.uint8):
                self.mac.account.kernel("nonzero")
                self.mac.account.sync("nonzero")

    def charge_decomposed_norm(self, x: Tensor) -> None:
        """GroupNorm as torch's Python reference computes it: 9 kernels, in half precision 4 casts more, in float32."""
        self.mac.account.kernel("native_group_norm", 9 if x.dtype == torch.float32 else 13)
        self.mac.account.scratch(2 * 4 * x.numel())

    def wrap(self, op: Operator, out: Any, args: Any, kwargs: Any) -> Any:
        """Results as tensors of the device; one that is an argument's own (in place, ``out=``) is that argument."""
        if not op.writes:
            return mapped(lambda x: VirtualTensor(x, self.mac), out)
        owners = {id(x.host): x for x in tensors_in(args, kwargs) if isinstance(x, VirtualTensor)}

        def wrapped(x: Tensor) -> Tensor:
            owner = owners.get(id(x))
            if owner is None:
                return VirtualTensor(x, self.mac)
            if owner.shape != x.shape or owner.stride() != x.stride() or owner.storage_offset() != x.storage_offset():
                reshape(owner, VirtualTensor(x, self.mac))
            return owner

        return mapped(wrapped, out)


def reshape(owner: VirtualTensor, like: VirtualTensor) -> None:
    """Gives a tensor another's values, shape and strides, in place."""
    undisturbed = torch._C._DisableTorchDispatch()  # as long as it lives; a context only in newer torch
    Tensor.data.__set__(owner, like)  # type: ignore[attr-defined]
    del undisturbed
    owner.adopt(like.host, like.mac)


def computed(op: Operator, args: Any, kwargs: Any) -> Any:
    """The CPU's result; in float32 where an older torch's CPU has no kernel in half precision."""
    try:
        return op.func(*args, **kwargs)
    except RuntimeError as error:
        if "not implemented for 'Half'" not in str(error):
            raise
        return half_by_float32(op, args, kwargs)


def half_by_float32(op: Operator, args: Any, kwargs: Any) -> Any:
    """A result of half-precision operands as a GPU computes it: in float32, and rounded once.

    The CPU's own kernels for products of them are a hundred times slower.
    """
    given = tensors_in(args)
    wide = (mapped(lambda x: x.float() if x.dtype in HALF else x, tree) for tree in (args, kwargs))
    result = mapped(lambda x: x.to(given[0].dtype), op.func(*next(wide), **next(wide)))
    return given[0].copy_(result) if op.name.endswith("_") else result


def bytes_of(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def poison(x: Tensor) -> None:
    """Fills memory that nobody has written with what is noticed when it is read."""
    if x.is_meta:
        return
    if x.is_floating_point() or x.is_complex():
        x.fill_(math.nan)
    elif x.dtype == torch.bool:
        x.fill_(True)
    else:
        x.fill_(torch.iinfo(x.dtype).max)


def uninitialised(self: Operators, op: Operator, args: Any, kwargs: Any) -> Any:
    """``empty`` and its kin: memory full of NaN, and no kernel."""
    self.check_result(op, op.bind(args, kwargs))
    out = self.compute(op, args, kwargs)
    self.mac.account.allocation(op.base)
    made = self.wrap(op, out, args, kwargs)
    poison(out)
    return made


def convert(self: Operators, op: Operator, args: Any, kwargs: Any) -> Any:
    """``_to_copy``: a cast on the device, an upload, or a download."""
    mac, x = self.mac, args[0]
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else x.device
    mac.check_dtype(kwargs.get("dtype") or x.dtype)
    hasty = bool(kwargs.get("non_blocking")) and target.type != x.device.type
    rest = {**kwargs, "non_blocking": False, "device": mac.host if target.type == "mps" else target}
    if not isinstance(x, VirtualTensor):
        mac.account.sync("upload")
        mac.account.check(x.numel() * bytes_of(kwargs.get("dtype") or x.dtype))
        out = mac.hurried(hasty, op.func(x, **rest))
        return VirtualTensor(out, mac)
    if target.type == "mps":
        rules.check_operands([x])
        rules.check_operand(x.shape, bytes_of(kwargs.get("dtype") or x.dtype))
        mac.account.kernel("_to_copy")
        return VirtualTensor(op.func(x.host, **rest), mac)
    mac.account.sync("download")
    return mac.hurried(hasty, op.func(mac.readable(x.host), **rest))


def copy(self: Operators, op: Operator, args: Any, kwargs: Any) -> Any:
    """``copy_`` within the device, to it, or from it."""
    mac = self.mac
    bound = op.bind(args, kwargs)
    into, source = bound["self"], bound["src"]
    there, here = isinstance(into, VirtualTensor), isinstance(source, VirtualTensor)
    mac.check_dtype(into.dtype)
    if there and here:
        rules.check_operands([into, source])
        mac.account.kernel("copy_")
    else:
        mac.account.sync("upload" if there else "download")
    value = source.host if there and here else mac.readable(source.host) if here else source
    written = mac.to_host(into).copy_(value)
    if there != here:
        mac.hurried(bool(bound["non_blocking"]), written)
    return into


def read_number(self: Operators, op: Operator, args: Any, kwargs: Any) -> Any:
    """``item`` and all that is made of it, ``bool(x)`` for one: the host waits for a number."""
    self.mac.account.sync("item")
    return op.func(self.mac.readable(args[0].host))


SPECIAL: dict[str, Callable[[Operators, Operator, Any, Any], Any]] = {
    **dict.fromkeys(UNINITIALISED, uninitialised),
    "_to_copy": convert,
    "copy_": copy,
    "_local_scalar_dense": read_number,
}
