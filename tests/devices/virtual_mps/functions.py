"""Calls that must be met above the operators, as Python functions.

torch's own code around some of them asks for the device's guard, which only a torch built for mps has (indexing,
``contiguous``, ``copy_``, ``tensor(…, device="mps")``, …); others, mps computes in one piece where the CPU takes
them apart (``linear``, ``scaled_dot_product_attention``). ``Functions`` is the function mode that is active on a
virtual Mac; each entry of ``HANDLERS`` takes one function's call on tensors of the Mac.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import attention, rules
from .operators import reshape
from .tensor import MPS, VirtualTensor, mapped, tensors_in

if TYPE_CHECKING:
    from .machine import VirtualMac

aten = torch.ops.aten
WITHOUT_INDEX = torch.device("mps")

Handler = Callable[..., Any]
HANDLERS: dict[Any, Handler] = {}


class Functions(TorchFunctionMode):
    """Hands the calls that need it to their handler, and gives every ``"mps"`` its index."""

    def __init__(self, mac: VirtualMac) -> None:
        super().__init__()
        self.mac = mac

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(self.mac, func, *args, **kwargs)
        if kwargs.get("device") == "mps":
            kwargs = {**kwargs, "device": MPS}
        args = tuple(indexed(arg) for arg in args)
        return func(*args, **{name: indexed(arg) for name, arg in kwargs.items()})


def indexed(value: Any) -> Any:
    """``mps`` is ``mps:0``; torch asks the device which it is, and there is none."""
    return MPS if isinstance(value, torch.device) and value == WITHOUT_INDEX else value


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def virtual(*values: Any) -> bool:
    return any(isinstance(x, VirtualTensor) for x in tensors_in(*values))


@handles(Tensor.to)
def to(mac: VirtualMac, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``to("mps")``, ``to(device, dtype)``, ``to(other)``."""
    args = tuple(MPS if arg in ("mps", WITHOUT_INDEX) and not isinstance(arg, Tensor) else arg for arg in args)
    if kwargs.get("device") is not None:
        kwargs["device"] = indexed(torch.device(kwargs["device"]))
    if x.requires_grad and MPS in (*args, kwargs.get("device")):
        x = x.detach()  # see requires_grad
    return func(x, *args, **kwargs)


@handles(torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
def from_data(mac: VirtualMac, func: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    """A tensor from Python's or NumPy's numbers: made on the CPU, then copied to the device."""
    if func is Tensor.new_tensor:
        device = args[0].device if device is None else device
        kwargs.setdefault("dtype", args[0].dtype)
        func, args = torch.tensor, args[1:]
    if device is None and args and isinstance(args[0], VirtualTensor):
        device = MPS if func is not torch.tensor else None
    if args and isinstance(args[0], VirtualTensor):
        x = args[0].detach().clone() if func is torch.tensor else args[0]
        return x.to(device=device or x.device, dtype=kwargs.get("dtype") or x.dtype)
    if device is None or torch.device(device).type != "mps":
        return func(*args, device=device, **kwargs)
    return func(*args, **kwargs).to(MPS)


@handles(Tensor.contiguous)
def contiguous(mac: VirtualMac, func: Any, x: Tensor, memory_format: Any = torch.contiguous_format) -> Tensor:
    if not virtual(x):
        return func(x, memory_format=memory_format)
    return x if x.is_contiguous(memory_format=memory_format) else x.clone(memory_format=memory_format)


@handles(Tensor.copy_)
def copy_(mac: VirtualMac, func: Any, x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not virtual(x, source):
        return func(x, source, non_blocking)
    return aten.copy_.default(x, source.detach(), non_blocking)


@handles(Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def requires_grad(mac: VirtualMac, func: Any, x: Tensor, requires_grad: bool = True) -> Any:
    """Nothing on the device ever requires a gradient: autograd would ask for streams that this torch does not have."""
    return x if virtual(x) else func(x, requires_grad)


@handles(Tensor.item)
def item(mac: VirtualMac, func: Any, x: Tensor) -> Any:
    return aten._local_scalar_dense.default(x) if virtual(x) and x.numel() == 1 else func(x)


@handles(Tensor.nonzero, torch.nonzero)
def nonzero(mac: VirtualMac, func: Any, x: Tensor, *, as_tuple: bool = False) -> Any:
    if not virtual(x):
        return func(x, as_tuple=as_tuple)
    found = aten.nonzero.default(x)
    return found.unbind(1) if as_tuple else found


@handles(Tensor.__invert__)
def invert(mac: VirtualMac, func: Any, x: Tensor) -> Tensor:
    return aten.bitwise_not.default(x) if virtual(x) else func(x)


@handles(Tensor.repeat_interleave, torch.repeat_interleave)
def repeat_interleave(mac: VirtualMac, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Before torch 2.0 a number of repeats was made a tensor, for which mps had no kernel; now it is a copy."""
    if virtual(x) and mac.torch < (2, 0):
        raise rules.no_kernel("repeat_interleave.Tensor")
    return func(x, *args, **kwargs)


@handles(Tensor.__getitem__)
def getitem(mac: VirtualMac, func: Any, x: Tensor, index: Any) -> Tensor:
    """Numbers, slices, None and … make a view; tensors and lists gather."""
    index = plain_numbers(index)
    if not virtual(x, index):
        return func(x, index)
    if not isinstance(x, VirtualTensor):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if is_basic(index):
        mac.account.view("getitem")
    else:
        charge_gather(mac, index)
        mac.account.kernel("index")
    return VirtualTensor(func(x.host, mapped(mac.to_host, index)), mac)


@handles(Tensor.__setitem__)
def setitem(mac: VirtualMac, func: Any, x: Tensor, index: Any, value: Any) -> None:
    index = plain_numbers(index)
    if not virtual(x, index, value):
        return func(x, index, value)
    if is_basic(index):
        target = getitem(mac, Tensor.__getitem__, x, index)
        if isinstance(value, Tensor):
            aten.copy_.default(target, value.detach())
        else:
            target.fill_(value)
        return None
    rules.check_same_device("index_put_", [value] if isinstance(value, Tensor) else [])
    assert isinstance(x, VirtualTensor)
    charge_gather(mac, index)
    mac.account.kernel("index_put_")
    return func(x.host, mapped(mac.to_host, index), mapped(mac.to_host, value))


def plain_numbers(index: Any) -> Any:
    """Whole numbers that are tensors of the device are read, as torch reads them: the host waits."""
    if isinstance(index, tuple):
        return tuple(plain_numbers(item) for item in index)
    is_number = isinstance(index, VirtualTensor) and index.dim() == 0 and index.dtype not in (torch.bool, torch.uint8)
    return aten._local_scalar_dense.default(index) if is_number else index


def is_basic(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(
        item is None or item is ... or (isinstance(item, (int, slice)) and not isinstance(item, bool)) for item in items
    )


def charge_gather(mac: VirtualMac, index: Any) -> None:
    """What indices cost: those on the CPU are copied to the device, masks become positions that the host counts."""
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
            mac.account.kernel("nonzero")
            mac.account.sync("nonzero")
        if isinstance(item, (list, Tensor)) and not isinstance(item, VirtualTensor):
            mac.account.sync("upload")


@handles(F.linear)
def linear(mac: VirtualMac, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One kernel on mps, where the CPU takes it apart into a view and products."""
    if not virtual(input, weight, bias):
        return func(input, weight, bias)
    return mac.operators.run(aten.linear.default, (input, weight, bias), {})


@handles(Tensor.data.__get__)  # type: ignore[attr-defined]
def get_data(mac: VirtualMac, func: Any, x: Tensor) -> Tensor:
    return x.detach() if virtual(x) else func(x)


@handles(Tensor.data.__set__)  # type: ignore[attr-defined]
def set_data(mac: VirtualMac, func: Any, x: Tensor, value: Tensor) -> None:
    """``parameter.data = …``: on the device in place, across devices by swapping what the two names stand for."""
    if not virtual(x, value):
        return func(x, value)
    if isinstance(x, VirtualTensor) and isinstance(value, VirtualTensor):
        return reshape(x, value)
    made = value.detach()
    if isinstance(x, torch.nn.Parameter):
        made = torch.nn.Parameter(made, requires_grad=x.requires_grad)
    return torch.utils.swap_tensors(x, made)


def scaled_dot_product_attention(mac: VirtualMac, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    given = inspect.signature(signature).bind(*args, **kwargs).arguments
    if not virtual(given):
        return func(*args, **kwargs)
    attention.refuse(mac, given)
    tensors = [x for x in (given[name] for name in ("query", "key", "value")) if x is not None]
    mask = given.get("attn_mask")
    rules.check_same_device("scaled_dot_product_attention", [*tensors, *([] if mask is None else [mask])])
    q, k, v = (mac.to_host(x) for x in tensors)
    call = attention.Call(
        q, k, v, None if mask is None else mac.to_host(mask), given.get("is_causal", False), given.get("scale")
    )
    return VirtualTensor(attention.run(mac, call), mac)


def signature(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """The names of the attention function's arguments; torch's own is a builtin and does not tell."""


if attention.compute is not None:
    HANDLERS[attention.compute] = scaled_dot_product_attention
