"""The part of a pipeline that moves its networks: where the user wants them, and where the plan of each call does."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from russet import validation
from russet.backends.cuda.graphs import Graphs
from russet.checkpoints.arguments import read_dtype
from russet.errors import ArgumentTypeError, DoesNotFit, InputError
from russet.hardware.facts import best_device, read_facts
from russet.planning.plan import Plan, PlanCache, Request
from russet.planning.workload import Workload
from russet.residency import network as residency
from russet.residency import weights
from russet.residency.form import Precision, dtype_name, dtype_named, resting_device
from russet.residency.kernels import compile_kernels, set_environment
from russet.residency.network import AtWork, ManagedNetwork, OpenRun, Use

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TRANSIENT = ("graphs", "_plans", "_placing", "_placed_for")  # attributes of a pipeline that no copy has


class MovesNetworks:
    """Moves networks as the user says, and as the plan of each call wants them.

    What is known about one network is known to all pipelines that share it: see ``residency.network``.
    """

    def __init__(self) -> None:
        self._choices = Request()
        self._device = torch.device("cpu")
        self._dtype: torch.dtype | None = None  # what the user asked for; None: the plan decides
        self._as_given: frozenset[str] = frozenset()  # components whose precision the plan leaves alone
        self._pending = False  # whether networks are still to be put in place, and their weights to be read
        self._placing = threading.RLock()
        self._placed_for: Plan | None = None
        self._plans = PlanCache()
        self.graphs = Graphs()

    def __getstate__(self) -> dict[str, Any]:
        """What ``pickle`` keeps: the components with all of their weights, and the user's choices."""
        self.read_weights()
        for managed in self._managed().values():
            managed.load_plain()
        return {name: value for name, value in vars(self).items() if name not in TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._placing, self._placed_for = threading.RLock(), None
        self._plans, self.graphs = PlanCache(), Graphs()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Networks that are not loaded stay so, in the copy too, which reads for itself."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        for managed in self._managed().values():
            managed.copied(memo)
        kept = {name: value for name, value in vars(self).items() if name not in TRANSIENT}
        other.__setstate__(copy.deepcopy(kept, memo))
        return other

    def _networks(self) -> dict[str, nn.Module]:
        """The components that hold weights, loaded or not."""
        raise NotImplementedError

    def workload(
        self, height: int | None, width: int | None, images: int, *, guided: bool, encodes: bool = False
    ) -> Workload:
        """The numbers that a plan is made from; each pipeline knows how its components hang together."""
        raise InputError(f"{type(self).__name__} draws nothing itself; use a pipeline such as StableDiffusionPipeline")

    def _choose(self, **choices: Any) -> None:
        self._choices = dataclasses.replace(self._choices, **choices)

    def _managed(self) -> dict[str, ManagedNetwork]:
        return {name: residency.of(network) for name, network in self._networks().items()}

    # -- what the user says

    def to(self, *target: str | torch.device | torch.dtype, **named: Any) -> Self:
        """Moves the pipeline to a device, a precision, or both: ``pipe.to("mps")``, ``pipe.to("cuda", torch.float16)``.

        A precision given here or to ``from_pretrained`` is obeyed. Without one it follows the device: half precision on
        mps and cuda, except where that is known to go wrong, bfloat16 on a CPU with AMX, and float32 on others.

        Raises:
            DeviceError: the device is not there.
            InputError: what was given is neither a device nor a precision.
        """
        device, dtype = read_target(target, named)
        before, pending = (self._device, self._dtype, self._as_given), self._pending
        if device is not None:
            set_environment(device)
            read_facts(device)  # raises where it is not there
            self._device = device
        if dtype is not None:
            self._dtype, self._as_given = dtype, frozenset()
        try:
            self._place()
        except BaseException:
            self._device, self._dtype, self._as_given = before
            if not pending:
                with contextlib.suppress(DoesNotFit):  # there neither: the networks are where they were
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
        managed = self._managed()
        return (managed.get("unet") or next(iter(managed.values()))).dtype

    # -- what the plan says

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
        workload = self.workload(height, width, num_images, guided=guidance_scale > 1, encodes=encodes)
        return self._plans.plan(read_facts(self._device, weights=self._bytes_on_device()), workload, self._request())

    def _bytes_on_device(self) -> int:
        """Bytes of weights that are on the pipeline's device now."""
        found = 0
        for network in self._networks().values():
            value = weights.first(network)  # a network is in one place and in one precision
            if value is not None and value.device.type == self._device.type:
                found += weights.nbytes(network)
        return found

    def _request(self) -> Request:
        """What the user decided: the switches, and the precision of what came with one."""
        wanted = {}
        managed = self._managed()
        for name, one in managed.items():
            dtype = one.dtype if name in self._as_given else self._dtype
            if dtype is not None:
                wanted[name] = dtype_name(dtype)
        return dataclasses.replace(
            self._choices,
            dtype=wanted,
            reloadable=all(one.droppable for one in managed.values()),
            text_encoder_exclusive=not any(managed[name].handed_out for name in TEXT_ENCODERS if name in managed),
        )

    # -- where networks are between calls

    def _place(self) -> None:
        """Puts every network where the plan wants it between calls, in its precision, and reads pending weights."""
        with self._placing:
            plan = self.plan()
            compile_kernels(plan, self._device)
            for name, managed in self._managed().items():
                resting = resting_device(name, plan, self._device)
                managed.place(resting, dtype_named(plan.dtype(name)), plan.memory_format, self._device)
            self._pending = False
            self._placed_for = plan

    def read_weights(self) -> None:
        """Reads the weights that are pending since ``from_pretrained``; does nothing where none are.

        Raises:
            CheckpointError: a file was changed since, or cannot be read.
        """
        if not self._pending:
            return
        with self._placing:
            if not self._pending:  # another thread has read them
                return
            try:
                self._place()
            except DoesNotFit:  # too large to draw here is no reason not to show it
                for managed in self._managed().values():
                    managed.load()
                self._pending = False

    def load_on_access(self, name: str) -> None:
        """A user gets a network: pending weights are read, and those that have been dropped will be once it is used."""
        self.read_weights()
        residency.of(vars(self)[name]).hand_out()

    @contextlib.contextmanager
    def weights_in_memory(self) -> Iterator[None]:
        """Has the weights of all networks in memory for as long as the block lasts, those that were dropped too."""
        self.read_weights()
        with contextlib.ExitStack() as stack:
            for managed in self._managed().values():
                stack.enter_context(managed.loaded())
            yield

    def _make_room(self, plan: Plan) -> None:
        """Sends networks to where a plan has them rest, before the first of them begins to work.

        Those that have to go leave before others arrive: there may not be room for all of them.
        """
        for name, managed in self._managed().items():
            resting = resting_device(name, plan, self._device)
            if not managed.is_at(resting) and resting != self._device:
                managed.rest(resting)
        self._placed_for = plan

    # -- at work

    def run_open(self) -> OpenRun:
        """``with pipe.run_open(): …``: networks keep the form in which they work until the block ends.

        Runs may be nested and overlap, of one pipeline or of several that share networks. When the last one that uses
        a network ends, by ``close``, the end of the block, or because nobody holds it any more, the network is a
        plain one again, and is where it rests.
        """
        self.read_weights()
        self._placed_for = None  # another pipeline may have moved networks that are shared since the last run
        return OpenRun(self._managed().values())

    def at_work(
        self, component: str, plan: Plan, precision: Precision | None = None
    ) -> contextlib.AbstractContextManager[ManagedNetwork | None]:
        """``with pipe.at_work("unet", plan): …``: the network is ready to work, in the plan's form and in no other.

        The block is this thread's turn on the device, so it should be short (one step) and call no code of the user.
        To enter it again for the next step takes microseconds. Blocks may be nested, also with another form.

        Args:
            component: its name; does nothing for one that is a function or is left out.
            plan: as ``plan()`` gave it; forms are compared by the plan's identity.
            precision: "attention" in float32 or all of the network in "float32", where half precision overflowed.
        """
        self.read_weights()
        network = vars(self).get(component)
        if not isinstance(network, nn.Module):
            return contextlib.nullcontext()
        if self._placed_for is not plan:
            self._make_room(plan)
        return AtWork(residency.of(network), Use(component, plan, self._device, precision), self.graphs)

    def free_copies(self, component: str) -> None:
        """Frees what was copied of a network's weights once its part of a run is done.

        Networks that begin to work do so for others, but one that has worked in the run before, as the VAE has that
        encoded a picture, only goes on.
        """
        network = vars(self).get(component)
        if isinstance(network, nn.Module):
            residency.of(network).free_copies()


def read_target(target: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[torch.device | None, torch.dtype | None]:
    """The arguments of ``to``: a device, a precision, or both, in either order."""
    known = ("device", "dtype", "torch_dtype")
    if unknown := [name for name in named if name not in (*known, "silence_dtype_warnings")]:
        raise InputError(f"to() takes {', '.join(known)}, not {', '.join(unknown)}")
    devices: list[torch.device] = []
    dtypes: list[torch.dtype | None] = []
    for one in (*target, *(named.get(name) for name in known)):
        if isinstance(one, torch.dtype):
            dtypes.append(read_dtype(dtype=one))
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
