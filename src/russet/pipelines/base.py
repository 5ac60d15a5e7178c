"""What all pipelines share: their components, where those come from, where they are, and the plan for them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self

from russet import arguments
from russet.checkpoints import load, save
from russet.checkpoints.draft import Draft
from russet.devices.facts import best_device, read_facts
from russet.devices.memory import Sizes
from russet.devices.plan import Plan, Request, plan
from russet.errors import ArgumentTypeError, DoesNotFit, InputError
from russet.pipelines import placement
from russet.pipelines.graphs import Graphs
from russet.pipelines.single_files import SingleFiles
from russet.pipelines.slots import Slot
from russet.pipelines.switches import Switches

ELSEWHERE = {
    "custom_pipeline": "no code comes from a checkpoint",
    "custom_revision": "no code comes from a checkpoint",
    "device_map": "load the pipeline and call .to(device), or enable_model_cpu_offload()",
    "low_cpu_mem_usage": "weights are always read straight into place; leave it out",
    "max_memory": "load the pipeline and call .to(device), which plans by the memory that there is",
    "mirror": "set HF_ENDPOINT, which huggingface_hub reads",
    "offload_folder": "call enable_model_cpu_offload()",
    "offload_state_dict": "weights are always read straight into place; leave it out",
    "output_loading_info": "weights that do not fit are an error that lists them",
    "proxies": "set HTTPS_PROXY, which huggingface_hub reads",
    "provider": "ONNX is not supported",
    "quantization_config": "quantised weights are not supported",
    "sess_options": "ONNX is not supported",
    "trust_remote_code": "no code comes from a checkpoint",
    "use_flashpack": "weights are safetensors or PyTorch's own files",
    "use_onnx": "ONNX is not supported",
}
"""Arguments of Diffusers' from_pretrained that Russet lacks, each with what to do instead."""


_PLACING = threading.RLock()  # weights are read by one thread, and others that look at them wait


@dataclasses.dataclass(frozen=True)
class Part:
    """One component that a pipeline is made of: the class it must have or ``others``, and whether it may be None."""

    kind: type
    others: tuple[type, ...] = ()
    optional: bool = False

    @property
    def kinds(self) -> tuple[type, ...]:
        return (self.kind, *self.others)


class DiffusionPipeline(SingleFiles, Switches):
    """Base of all pipelines. ``DiffusionPipeline.from_pretrained`` returns the pipeline that the checkpoint names.

    Components are attributes: ``pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)``. The
    weights of a checkpoint are read when they are needed: by ``.to(device)``, by a call, or by a look at a network.
    """

    parts: ClassVar[Mapping[str, Part]] = {}

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        for name in cls.parts:
            setattr(cls, name, Slot(name))

    def __init__(self, *, requires_safety_checker: bool = True, **components: Any) -> None:
        check_components(type(self).__name__, self.parts, components)
        self.requires_safety_checker = arguments.flag("requires_safety_checker", requires_safety_checker)
        self.index: Mapping[str, Any] = {}
        self._device = torch.device("cpu")
        self._dtype: torch.dtype | None = None  # what the user asked for; None: the plan decides
        self._as_given: frozenset[str] = frozenset(self.parts)  # whose precision the plan leaves alone
        self._drafts: Mapping[Any, Draft] = {}  # network → what reads its weights
        self._noticed: set[str] = set()  # components that somebody else has looked at
        self._waiting = False  # whether networks are still to be put in place, and their weights to be read
        self._placing = False
        self.graphs = Graphs()
        super().__init__()
        for name in self.parts:
            setattr(self, name, components.get(name))

    # -- where components come from and go to

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        force_download: bool = False,
        use_safetensors: bool | None = None,
        requires_safety_checker: bool | None = None,
        **components: Any,
    ) -> Self:
        """Opens a pipeline: checks its files, and leaves the weights for ``.to(device)`` or the first use to read.

        Args:
            pretrained_model_name_or_path: a Hub repository ("owner/name"), a local folder in Diffusers form, or
                "mini", the model that Russet carries.
            torch_dtype, dtype: the precision of all networks, a ``torch.dtype`` or its name. Left out it is float32
                on the CPU and half precision on mps and cuda; the result of a call says which was used, and why.
            variant: reads ``model.VARIANT.safetensors`` where there is such a file, "fp16" for example.
            revision, cache_dir, token, force_download, local_files_only: as in huggingface_hub.
            use_safetensors: True refuses pickled weights, False prefers them, None takes what is there.
            requires_safety_checker: whether a missing safety checker is worth a warning; left out, as the folder says.
            **components: used in place of the checkpoint's own (``vae=…``, ``scheduler=…``); None leaves one out
                (``safety_checker=None``).

        Raises:
            CheckpointError: the checkpoint is missing, damaged, unsafe, or does not fit its configs.
            ConfigError: a config cannot be built.
            InputError: an argument has a wrong type or value, or names no component.
        """
        elsewhere = {name: components.pop(name) for name in [*components] if name in ELSEWHERE}
        if elsewhere.get("low_cpu_mem_usage") is True:  # which is how Russet loads
            del elsewhere["low_cpu_mem_usage"]
        arguments.refuse_unknown(elsewhere, ELSEWHERE, "from_pretrained()")
        precision = load.read_dtype(torch_dtype=torch_dtype, dtype=dtype)
        options = load.Options(
            variant=variant,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            force_download=force_download,
            use_safetensors=use_safetensors,
        )
        loaded = load.pipeline(
            pretrained_model_name_or_path, overrides=components, dtype=precision, options=options, postponed=True
        )
        return cls.assemble(loaded, precision, given=components, requires_safety_checker=requires_safety_checker)

    @classmethod
    def assemble(
        cls,
        loaded: load.Loaded,
        dtype: torch.dtype | None,
        *,
        given: Mapping[str, Any],
        requires_safety_checker: bool | None = None,
    ) -> Self:
        """Makes the pipeline out of what was read. ``given`` are the components that the caller brought along."""
        from russet.pipelines.classes import pipeline_class

        kind = pipeline_class(loaded.class_name) if cls is DiffusionPipeline else cls
        check_components(f"{loaded.source} ({kind.__name__})", kind.parts, loaded.components)
        if requires_safety_checker is None:
            requires_safety_checker = bool(loaded.index.get("requires_safety_checker", True))
        pipe = kind(requires_safety_checker=requires_safety_checker, **loaded.components)
        pipe.index = loaded.index
        pipe._dtype = dtype
        pipe._as_given = frozenset(given)
        pipe._drafts = loaded.drafts
        plan = None
        with contextlib.suppress(DoesNotFit):  # too large to draw on the CPU is no reason not to load
            plan = pipe.plan()
        for name, network in pipe._networks().items():
            wanted = placement.dtype_named(plan.dtype(name)) if plan else dtype or torch.float32
            if network in loaded.drafts and next(network.parameters()).dtype != wanted:
                network.to(wanted)  # so that it says in which precision its weights will be
        pipe._waiting = True
        assert isinstance(pipe, cls)
        return pipe

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        variant: str | None = None,
        safe_serialization: bool = True,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Writes a folder in Diffusers form, which Diffusers and Russet read.

        Raises:
            CheckpointError: the folder cannot be written; what stood there before is intact.
        """
        index = {**self.index, "requires_safety_checker": self.requires_safety_checker}
        with self.whole():
            save.pipeline(
                save_directory,
                type(self).__name__,
                self._components(),
                index,
                variant=variant,
                safe_serialization=safe_serialization,
                max_shard_size=max_shard_size,
            )

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Has the weights of all networks in memory for as long as the block lasts, those that rest on disk too."""
        with contextlib.ExitStack() as stack:
            for network in self._present().values():
                stack.enter_context(placement.whole(network, self._drafts.get(network)))
            yield

    @property
    def components(self) -> dict[str, Any]:
        """Name → component, None where it was left out; ``OtherPipeline(**pipe.components)`` shares them."""
        return {name: getattr(self, name) for name in self.parts}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The components that hold weights."""
        return {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}

    def _components(self) -> dict[str, Any]:
        """The same as ``components``, for the pipeline itself."""
        return {name: self.known(name) for name in self.parts}

    def known(self, name: str) -> Any:
        """A component for what its config says, its weights read or not; None where it was left out."""
        return vars(self).get(name)

    def _networks(self) -> dict[str, nn.Module]:
        """The same as ``networks``, their weights read or not."""
        return {name: part for name in self.parts if isinstance(part := self.known(name), nn.Module)}

    def _present(self) -> dict[str, nn.Module]:
        """The same as ``networks``, their weights read but for those that the plan has dropped."""
        self.read_weights()
        return self._networks()

    def __repr__(self) -> str:
        known = ((name, self.known(name)) for name in self.parts)
        parts = (f"  {name}: {type(part).__name__}" for name, part in known if part is not None)
        return "\n".join([f"{type(self).__name__} on {self.device}, {placement.dtype_name(self.dtype)}", *parts])

    # -- where they are

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
            device = f"cuda:{arguments.integer('gpu_id', gpu_id, least=0)}"
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
        self, *, height: int | None = None, width: int | None = None, num_images: int = 1, guidance_scale: float = 7.5
    ) -> Plan:
        """What Russet decides for a picture of this size on this device, each decision with its reason.

        Sizes in pixels; left out they are what the model was trained at. ``print(pipe.plan())`` reads as text.

        Raises:
            DoesNotFit: the work needs more memory than there is; the error names the largest size that would fit.
        """
        sizes = self.sizes(height, width, num_images, guided=guidance_scale > 1)
        return plan(read_facts(self._device, weights=self._weights_there()), sizes, self._request())

    def _weights_there(self) -> int:
        """Bytes of weights that are on the pipeline's device now; a network is in one place and in one precision."""
        firsts = {network: next(network.parameters()) for network in self._networks().values()}
        there = {network: first for network, first in firsts.items() if first.device.type == self._device.type}
        return sum(placement.size(network) * first.element_size() for network, first in there.items())

    def sizes(self, height: int | None, width: int | None, images: int, *, guided: bool) -> Sizes:
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


def check_components(where: str, parts: Mapping[str, Part], components: Mapping[str, Any]) -> None:
    """Raises unless each component is there and of its kind, and there is no other.

    Raises:
        ArgumentTypeError: a component of another class, or one missing that the pipeline cannot do without.
        InputError: a component that the pipeline does not have.
    """
    if foreign := [name for name, part in components.items() if name not in parts and part is not None]:
        raise InputError(f"{where} has no component {', '.join(foreign)}; it has {', '.join(parts)}")
    for name, part in parts.items():
        component = components.get(name)
        if component is None and part.optional:
            continue
        # a network may come wrapped (torch.compile), so it is known by its config too
        configs = tuple(kind.config_class for kind in part.kinds if hasattr(kind, "config_class"))
        wrapped = isinstance(getattr(component, "config", None), configs)
        if not isinstance(component, part.kinds) and not wrapped:
            came = "nothing" if component is None else f"{type(component).__module__}.{type(component).__name__}"
            raise ArgumentTypeError(f"{where}: {name} must be a russet {part.kind.__name__}, not {came}")


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
            raise ArgumentTypeError(f"to() takes a device or a torch.dtype, not {arguments.shown(one)}")
    if len(devices) > 1 or len(dtypes) > 1:
        raise InputError("to() takes one device and one precision")
    return next(iter(devices), None), next(iter(dtypes), None)


def read_device(name: str | torch.device) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise InputError(f"{name!r} is no device; use 'mps', 'cuda', 'cuda:1' or 'cpu'") from None
