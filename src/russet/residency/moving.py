"""Where a pipeline's networks are, what moves them, and the plan that says where they should be."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self

from russet import validation
from russet.backends.cuda.graphs import Graphs
from russet.checkpoints import load
from russet.checkpoints.pending_weights import Draft
from russet.errors import ArgumentTypeError, DoesNotFit, InputError
from russet.hardware.facts import best_device, read_facts
from russet.pipelines.switches import Switches
from russet.planning.memory import Sizes
from russet.planning.plan import Plan, Request, plan
from russet.residency import placement

if TYPE_CHECKING:
    from russet.pipelines.base import Part

_PLACING = threading.RLock()  # weights are read by one thread, and others that look at them wait


class Movable(Switches):
    """The part of a pipeline that moves its networks: as it is told to, and as the plan of each call wants them."""

    if TYPE_CHECKING:  # what the pipeline brings
        parts: ClassVar[Mapping[str, Part]]

        def _networks(self) -> dict[str, nn.Module]: ...

    def __init__(self) -> None:
        super().__init__()
        self._device = torch.device("cpu")
        self._dtype: torch.dtype | None = None  # what the user asked for; None: the plan decides
        self._as_given: frozenset[str] = frozenset(self.parts)  # whose precision the plan leaves alone
        self._drafts: Mapping[Any, Draft] = {}  # network → what reads its weights
        self._noticed: set[str] = set()  # components that somebody else has looked at
        self._waiting = False  # whether networks are still to be put in place, and their weights to be read
        self._placing = False
        self.graphs = Graphs()

    def to(self, *target: str | torch.device | torch.dtype, **named: Any) -> Self:
        """Moves the pipeline to a device, a precision, or both: ``pipe.to("mps")``, ``pipe.to("cuda", torch.float16)``.

        A precision given here or to ``from_pretrained`` is obeyed. Without one it follows the device: float32 on the
        CPU, half precision on mps and cuda, except where that is known to go wrong.

        Raises:
            DeviceError: the device is not there.
            InputError: what was given is neither a device nor a precision.
        """
        device, dtype = read_target(target, named)
        before, waiting = (self._device, self._dtype, self._as_given), self._waiting
        if device is not None:
            placement.set_environment(device)
            read_facts(device)  # raises where it is not there
            self._device = device
        if dtype is not None:
            self._dtype, self._as_given = dtype, frozenset()
        try:
            self._place()
        except BaseException:
            self._device, self._dtype, self._as_given = before
            if not waiting:
                self._place()
            raise
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: str | torch.device | None = None) -> None:
        """Keeps each network on the CPU while it does not work; slower by the time that moving them takes.

        gpu_id, device: where to compute; left out, where the pipeline is, or the best device if that is the CPU.
        """
        self._offload("model", gpu_id, device)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Keeps each layer on the CPU while it does not work: the least memory, and the slowest."""
        self._offload("sequential", gpu_id, device)

    def _offload(self, mode: str, gpu_id: int | None, device: str | torch.device | None) -> None:
        if gpu_id is not None and device is not None:
            raise InputError("give either gpu_id or device, and not both")
        if gpu_id is not None:
            device = f"cuda:{validation.integer('gpu_id', gpu_id, least=0)}"
        if device is None:
            device = self._device if self._device.type != "cpu" else best_device()
        self._choose(offload=mode)
        self.to(device)

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its main network."""
        networks = self._networks()
        main = networks.get("unet") or next(iter(networks.values()))
        return next(main.parameters()).dtype

    def plan(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        num_images: int = 1,
        guidance_scale: float = 7.5,
        encodes: bool = False,
    ) -> Plan:
        """What Russet decides for a picture of this size on this device, each decision with its reason.

        Sizes in pixels; left out they are what the model was trained at. ``encodes``: whether a picture goes in (image
        to image). ``print(pipe.plan())`` reads as text.

        Raises:
            DoesNotFit: the work needs more memory than there is; the error names the largest size that would fit.
        """
        sizes = self.sizes(height, width, num_images, guided=guidance_scale > 1, encodes=encodes)
        return plan(read_facts(self._device, weights=self._weights_there()), sizes, self._request())

    def _weights_there(self) -> int:
        """Bytes of weights that are on the pipeline's device now; a network is in one place and in one precision."""
        firsts = {network: next(network.parameters()) for network in self._networks().values()}
        there = {network: first for network, first in firsts.items() if first.device.type == self._device.type}
        return sum(placement.size(network) * first.element_size() for network, first in there.items())

    def sizes(
        self, height: int | None, width: int | None, images: int, *, guided: bool, encodes: bool = False
    ) -> Sizes:
        """The numbers that a plan is made from; each pipeline knows how its components hang together."""
        raise InputError(f"{type(self).__name__} draws nothing itself; use a pipeline such as StableDiffusionPipeline")

    def _request(self) -> Request:
        """What the user decided: the switches, and the precision of what came with one."""
        wanted = {}
        networks = self._networks()
        for name, network in networks.items():
            dtype = next(network.parameters()).dtype if name in self._as_given else self._dtype
            if dtype is not None:
                wanted[name] = placement.dtype_name(dtype)
        return dataclasses.replace(
            self._choices,
            dtype=wanted,
            rereadable=self._drafts.keys() >= set(networks.values()),
            unnoticed="text_encoder" not in self._noticed,
        )

    def _place(self) -> None:
        """Puts every network where the plan wants it between calls, in its precision; weights that wait go there."""
        with _PLACING:
            outer, self._placing = self._placing, True
            try:
                plan = self.plan()
                self.graphs.clear()  # their weights are about to move
                placement.compile_kernels(plan, self._device)
                for name, network in self._networks().items():
                    home = placement.home(name, plan, self._device)
                    placement.settle(name, network, plan, home, self._drafts.get(network))
                self._waiting = False
            finally:
                self._placing = outer

    def read_weights(self) -> None:
        """Reads the weights that have waited on disk since ``from_pretrained``; does nothing where none do.

        Raises:
            CheckpointError: a file was changed since, or cannot be read.
        """
        if not self._waiting:
            return
        with _PLACING:
            if not self._waiting or self._placing:  # another thread has read them; or this one is about to
                return
            try:
                self._place()
            except DoesNotFit:  # too large to draw here is no reason not to look at it
                for network in self._networks().values():
                    if draft := self._drafts.get(network):
                        placement.fetch(network, draft)
                self._waiting = False

    def looked_at(self, name: str) -> None:
        """Somebody looks at a network: it is there, and stays, unless memory is too short for that."""
        self._noticed.add(name)
        self.read_weights()
        if name != "text_encoder" or not placement.is_empty(self.known(name)):
            return
        with _PLACING, contextlib.suppress(DoesNotFit):
            draft = self._drafts.get(self.known(name))
            if draft is not None and placement.home(name, self.plan(), self._device) != placement.META:
                placement.fetch(self.known(name), draft)

    def _present(self) -> dict[str, nn.Module]:
        """The same as ``networks``, their weights read but for those that the plan has dropped."""
        self.read_weights()
        return self._networks()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Has the weights of all networks in memory for as long as the block lasts, those that rest on disk too."""
        with contextlib.ExitStack() as stack:
            for network in self._present().values():
                stack.enter_context(placement.whole(network, self._drafts.get(network)))
            yield

    def _replace(self, plan: Plan) -> None:
        """Moves those networks that the plan of a call wants elsewhere than the call before left them.

        Those that have to go leave before others arrive: there may not be room for all of them.
        """
        networks = self._present()
        homes = {name: placement.home(name, plan, self._device) for name in networks}
        moving = [name for name, network in networks.items() if not placement.is_at(network, homes[name])]
        if moving:
            self.graphs.clear()
        for name in sorted(moving, key=lambda name: homes[name] == self._device):
            network = networks[name]
            placement.settle(name, network, plan, homes[name], self._drafts.get(network))

    def at_work(self, component: str, plan: Plan) -> contextlib.AbstractContextManager[None]:
        """Has a network ready to work while the block lasts: ``with pipe.at_work("unet", plan): …``."""
        network = self._present()[component]
        return placement.at_work(component, network, plan, self._device, self._drafts.get(network))


def read_target(target: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[torch.device | None, torch.dtype | None]:
    """The arguments of ``to``: a device, a precision, or both, in either order."""
    known = ("device", "dtype", "torch_dtype")
    if unknown := [name for name in named if name not in (*known, "silence_dtype_warnings")]:
        raise InputError(f"to() takes {', '.join(known)}, not {', '.join(unknown)}")
    devices: list[torch.device] = []
    dtypes: list[torch.dtype | None] = []
    for one in (*target, *(named.get(name) for name in known)):
        if isinstance(one, torch.dtype):
            dtypes.append(load.read_dtype(dtype=one))
        elif isinstance(one, (str, torch.device)):
            devices.append(read_device(one))
        elif one is not None:
            raise ArgumentTypeError(f"to() takes a device or a torch.dtype, not {validation.shown(one)}")
    if len(devices) > 1 or len(dtypes) > 1:
        raise InputError("to() takes one device and one precision")
    return next(iter(devices), None), next(iter(dtypes), None)


def read_device(name: str | torch.device) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise InputError(f"{name!r} is no device; use 'mps', 'cuda', 'cuda:1' or 'cpu'") from None
