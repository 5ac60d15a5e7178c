"""Known defects of mps, each with the versions that have it, and what it does to an operator's result.

The ids are those of ``russet.hardware.known_bugs`` where that table has the defect too; the ranges are written down
here on their own, so that a test can hold one table against the other. Sources: the links in that table, and those
given below.

An effect looks at an operator's arguments before it runs. It raises (a refusal, an abort) or returns what is to be done
to the result: a function that spoils it in place. Defects of attention are in ``attention``, those of copies and sizes
in ``operators`` and ``rules``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels import Version
from .rules import ProcessAborted
from .schema import INDEXING
from .tensor import mapped

if TYPE_CHECKING:
    from .machine import VirtualMac

ALWAYS: tuple[Version, Version] = ((), ())
ARITHMETIC = ("add", "sub", "rsub", "mul", "div", "pow", "remainder", "maximum", "minimum")


@dataclass(frozen=True)
class Defect:
    """Where a defect holds: from a first version to the one that has it no more; ``()`` leaves an end open."""

    id: str
    torch: tuple[Version, Version] = ALWAYS
    macos: tuple[Version, Version] = ALWAYS
    chips: tuple[str, ...] = ()  # none: all

    def holds(self, chip: str, torch: Version, macos: Version) -> bool:
        family = re.search(r"M\d+", chip)
        return (
            within(torch, self.torch)
            and within(macos, self.macos)
            and (not self.chips or (family is not None and family.group(0) in self.chips))
        )


def within(version: Version, bounds: tuple[Version, Version]) -> bool:
    first, fixed = bounds
    return version >= first and (not fixed or version < fixed)


DEFECTS = (
    Defect("no-sdpa", torch=((), (2, 0))),
    Defect("first-pass", torch=((), (2, 0))),
    Defect("empty-baddbmm", torch=((), (2, 14))),
    Defect("causal-leak", torch=((), (2, 13))),
    Defect("half-scores", macos=((14, 5), ())),
    Defect("strided-attention", torch=((), (2, 6))),
    Defect("short-queries", torch=((2, 8), (2, 13))),  # pytorch#163597, #181133: few queries, strides ignored
    Defect(
        "value-head-size", torch=((2, 5), (2, 12))
    ),  # pytorch#176767: as wide as the queries, whatever the values are
    Defect("big-scores"),
    Defect("long-contraction", chips=("M1", "M2")),
    Defect("long-matrix", torch=((2, 7), (2, 14)), chips=("M1", "M2")),  # pytorch#193487, more than 32768 terms
    Defect("channels-last"),
    Defect("strided-linear", torch=((2, 8), (2, 9))),  # pytorch#162779
    Defect("strided-convolution", torch=((), (2, 14)), macos=((15,), ())),
    Defect("sliced-channels", torch=((2, 9), ()), macos=((26, 2), ()), chips=("M5",)),
    Defect("scalar-views", torch=((), (2, 14))),
    Defect("mixed-operands", macos=((), (15,))),
    Defect("batched-linear", torch=((), (2, 14)), macos=((26,), (27,)), chips=("M1",)),
    Defect("batched-linear-m5", torch=((), (2, 13)), chips=("M5",)),
    Defect("dropped-bias", torch=((), (2, 14)), macos=((26,), (27,)), chips=("M1",)),  # pytorch#188438
    Defect("expanded-operands", macos=((15,), ())),  # pytorch#180201: right in macOS 26.4 and 26.5, wrong again in 27
    Defect("mixed-norms", torch=((2, 13), (2, 14))),  # pytorch#190054
    Defect("half-gelu", torch=((), (2, 0))),
    Defect("half-layer-norm", torch=((2, 0), (2, 1))),
    Defect("slow-group-norm", torch=((2, 1), (2, 13))),
    Defect("upsample-half", macos=((), (13,))),
    Defect("macos-13.2", macos=((13, 2), (13, 3))),
    Defect("macos-27-bf16", torch=((2, 13), (2, 14)), macos=((27,), ())),
    Defect("int64-reductions", torch=((), (2, 9)), macos=((), (13, 3))),  # the kernels' own checks of those releases
)

Arguments = Mapping[str, Any]
Spoil = Callable[[Tensor], object]
Effect = Callable[["VirtualMac", Arguments], Spoil | None]

EFFECTS: dict[str, list[tuple[str, Effect]]] = {}


def effect(defect: str, *operators: str) -> Callable[[Effect], Effect]:
    """Registers what a defect does to some operators (names without overload)."""

    def register(function: Effect) -> Effect:
        for name in operators:
            EFFECTS.setdefault(name, []).append((defect, function))
        return function

    return register


def spoilers(mac: VirtualMac, operator: str, arguments: Arguments) -> list[Spoil]:
    """What the machine's defects will do to the result of an operator with these arguments."""
    acts = [act for defect, act in EFFECTS.get(operator, []) if mac.has(defect)]
    on_host = mapped(mac.to_host, arguments) if acts else {}
    return [spoil for act in acts if (spoil := act(mac, on_host)) is not None]


def mangle(out: Tensor) -> None:
    """Values that are finite and wrong, as from memory read in the wrong order."""
    out.copy_(out.flip(-1) * -1 + 1)


def seen(mac: VirtualMac, operator: str, tree: Any) -> Any:
    """Operands as the machine's kernels take them: for a number on the CPU, perhaps the first one of its storage."""
    if operator not in ARITHMETIC or not mac.has("scalar-views"):
        return tree
    return mapped(lambda x: x.as_strided((), (), 0) if x.device.type == "cpu" and x.dim() == 0 else x, tree)


def check_one_precision(mac: VirtualMac, operator: str, tensors: list[Tensor]) -> None:
    """Aborts where floating-point operands differ in precision; numbers without dimensions may."""
    precisions = {x.dtype for x in tensors if x.dim() > 0 and x.is_floating_point()}
    if len(precisions) > 1 and operator not in INDEXING and mac.has("mixed-operands"):
        names = " and ".join(sorted(map(str, precisions)))
        raise ProcessAborted(f"error: input types of {operator}, {names}, are not broadcast compatible")


@effect("empty-baddbmm", "baddbmm")
def reads_what_it_should_ignore(mac: VirtualMac, a: Arguments) -> Spoil | None:
    if a["beta"] != 0:
        return None
    ignored = a["self"].clone()
    return lambda out: out.add_(ignored * 0)


@effect("long-contraction", "bmm", "baddbmm")
def loses_terms_of_batches(mac: VirtualMac, a: Arguments) -> Spoil | None:
    left, right = (a["self"], a["mat2"]) if "mat2" in a else (a["batch1"], a["batch2"])
    return loses_terms(left, right, 32766, a.get("alpha", 1))


@effect("long-matrix", "mm", "addmm")
def loses_terms_of_matrices(mac: VirtualMac, a: Arguments) -> Spoil | None:
    left, right = (a["mat1"], a["mat2"]) if "mat1" in a else (a["self"], a["mat2"])
    return loses_terms(left, right, 32768, a.get("alpha", 1))


def loses_terms(left: Tensor, right: Tensor, longest: int, alpha: float) -> Spoil | None:
    if left.shape[-1] <= longest:
        return None
    return lambda out: out.sub_(left[..., longest:] @ right[..., longest:, :], alpha=alpha)


@effect("channels-last", "convolution")
def reads_in_storage_order(mac: VirtualMac, a: Arguments) -> Spoil | None:
    x = a["input"]
    if x.dim() != 4 or x.is_contiguous() or x.stride(1) != 1 or x.shape[1] == 1:
        return None
    misread = x.permute(0, 2, 3, 1).reshape(x.shape)
    rest = [a[name] for name in ("stride", "padding", "dilation", "transposed", "output_padding", "groups")]
    return lambda out: out.copy_(torch.convolution(misread, a["weight"], a["bias"], *rest))


@effect("strided-convolution", "convolution")
def reads_weights_in_storage_order(mac: VirtualMac, a: Arguments) -> Spoil | None:
    return None if a["weight"].is_contiguous() else mangle


@effect("sliced-channels", "convolution")
def reads_rows_as_if_they_were_whole(mac: VirtualMac, a: Arguments) -> Spoil | None:
    """The second row of a batch is taken from right behind the first, where the channels lie that were left out."""
    x = a["input"]
    if x.dim() != 4 or len(x) == 1 or not x[0].is_contiguous() or x.stride(0) <= x[0].numel():
        return None
    misread = x.as_strided(x.shape, (x[0].numel(), *x[0].stride()), x.storage_offset())
    rest = [a[name] for name in ("stride", "padding", "dilation", "transposed", "output_padding", "groups")]
    return lambda out: out.copy_(torch.convolution(misread, a["weight"], a["bias"], *rest))


@effect("strided-linear", "linear")
def misreads_strided_weights(mac: VirtualMac, a: Arguments) -> Spoil | None:
    return None if a["weight"].is_contiguous() else mangle


@effect("expanded-operands", "bmm", "baddbmm", "mm", "addmm")
def loses_rows_of_expanded_operands(mac: VirtualMac, a: Arguments) -> Spoil | None:
    operands = [a[name] for name in ("mat1", "mat2", "batch1", "batch2") if name in a]
    operands += [a["self"]] if "mat2" in a and "mat1" not in a else []
    if not any(stride == 0 and size > 1 for x in operands for stride, size in zip(x.stride(), x.shape, strict=True)):
        return None
    return lambda out: out.mul_((torch.arange(out[..., 0].numel()) % 16 == 0).view(*out.shape[:-1], 1))


@effect("macos-13.2", "linear", "addmm", "mm")
def is_unreliable(mac: VirtualMac, a: Arguments) -> Spoil | None:
    return mangle


@effect("batched-linear", "linear")
def mixes_biased_rows(mac: VirtualMac, a: Arguments) -> Spoil | None:
    fused = a["bias"] is not None and a["input"].is_contiguous()  # others take another way
    return mangle if fused and a["input"].dim() > 2 else None


@effect("batched-linear-m5", "linear")
def mixes_rows_in_half_precision(mac: VirtualMac, a: Arguments) -> Spoil | None:
    return mangle if a["input"].dim() > 2 and a["input"].dtype != torch.float32 else None


@effect("dropped-bias", "linear")
def drops_biases_of_single_rows(mac: VirtualMac, a: Arguments) -> Spoil | None:
    alone = a["input"].dim() < 2 or a["input"].shape[-2] == 1
    return (lambda out: out.sub_(a["bias"])) if alone and a["bias"] is not None else None


@effect("macos-27-bf16", "linear")
def aborts_on_transposed_weights(mac: VirtualMac, a: Arguments) -> Spoil | None:
    if a["weight"].dtype == torch.bfloat16 and not a["weight"].is_contiguous():
        raise ProcessAborted("failed assertion in a bfloat16 linear layer with a transposed weight")
    return None


@effect("first-pass", "convolution", "linear", "addmm", "mm", "bmm", "baddbmm")
def differs_the_first_time(mac: VirtualMac, a: Arguments) -> Spoil | None:
    graph = tuple((name, x.shape, x.dtype) for name, x in a.items() if isinstance(x, Tensor))
    if graph in mac.graphs:
        return None
    mac.graphs.add(graph)
    return lambda out: out.mul_(1.03125)


@effect("mixed-norms", "native_layer_norm", "native_group_norm")
def confuses_weights(mac: VirtualMac, a: Arguments) -> Spoil | None:
    mixed = a["weight"] is not None and a["weight"].dtype != a["input"].dtype
    return (lambda out: out.copy_(out.flip(1))) if mixed else None


@effect("half-layer-norm", "native_layer_norm")
def crashes_in_half_precision(mac: VirtualMac, a: Arguments) -> Spoil | None:
    if a["input"].dtype == torch.float16:
        raise ProcessAborted("failed assertion in LayerNorm of float16")
    return None


@effect("half-gelu", "gelu")
def has_no_half_gelu(mac: VirtualMac, a: Arguments) -> Spoil | None:
    if a["self"].dtype == torch.float16:
        raise ProcessAborted("error: input types 'tensor<2xf16>' and 'tensor<1xf32>' are not broadcast compatible")
    return None


@effect("upsample-half", "upsample_nearest2d")
def runs_on_the_cpu(mac: VirtualMac, a: Arguments) -> Spoil | None:
    if (a.get("input") if "input" in a else a["self"]).dtype == torch.float16:
        raise RuntimeError("\"upsample_nearest2d_channels_last\" not implemented for 'Half'")
    mac.account.sync("upsample on the CPU")
    return None


@effect("int64-reductions", "min", "max", "amin", "amax", "sum", "prod", "sort", "argmin", "argmax", "cumsum")
def refuses_long_integers(mac: VirtualMac, a: Arguments) -> Spoil | None:
    if a["self"].dtype == torch.int64:
        raise RuntimeError("MPS: this reduction of int64 is supported from macOS 13.3 on; convert to int32 first")
    return None
