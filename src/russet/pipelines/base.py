"""What all pipelines share: their components, where those come from, and where they go to."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self

from russet import validation
from russet.checkpoints import load
from russet.errors import ArgumentTypeError, DoesNotFit, InputError
from russet.pipelines.registry import pipeline_class
from russet.pipelines.single_files import SingleFiles
from russet.pipelines.switches import Switches
from russet.residency import network as residency
from russet.residency.form import dtype_name, dtype_named
from russet.residency.lazy_component import LazyComponent

log = logging.getLogger(__name__)

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


@dataclasses.dataclass(frozen=True)
class Part:
    """One component that a pipeline is made of: the class it must have or ``others``, and whether it may be None.

    callable: whether any function will do, as Diffusers' users give one in place of a safety checker.
    """

    kind: type
    others: tuple[type, ...] = ()
    optional: bool = False
    callable: bool = False

    @property
    def kinds(self) -> tuple[type, ...]:
        return (self.kind, *self.others)


INTERNAL = frozenset(
    (
        "assemble", "on_device", "deep_cache", "family", "family_class", "finite_in",
        "geometry", "graphs", "index", "known", "load_on_access", "networks",
        "output", "parts", "read_weights", "requires_safety_checker", "run_open", "warmed_up",
        "weights_in_memory", "workload",
    )
)  # fmt: skip
"""Attributes that other parts of Russet use, which ``dir(pipe)`` leaves out: it shows what a user may call."""


class DiffusionPipeline(Switches, SingleFiles):
    """Base of all pipelines. ``DiffusionPipeline.from_pretrained`` returns the pipeline that the checkpoint names.

    Components are attributes: ``pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)``. The
    weights of a checkpoint are read when they are needed: by ``.to(device)``, by a call, or by a look at a network.
    """

    parts: ClassVar[Mapping[str, Part]] = {}

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        for name in cls.parts:
            setattr(cls, name, LazyComponent(name))

    def __init__(self, *, requires_safety_checker: bool = True, **components: Any) -> None:
        check_components(type(self).__name__, self.parts, components)
        self.requires_safety_checker = validation.flag("requires_safety_checker", requires_safety_checker)
        self.index: Mapping[str, Any] = {}
        super().__init__()
        self._as_given = frozenset(self.parts)
        for name in self.parts:
            setattr(self, name, components.get(name))
        if managed := self._managed():
            self._device = (managed.get("unet") or next(iter(managed.values()))).computing_device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Makes pictures, in pipelines that do; ``from_pretrained`` returns one of them.

        Raises:
            InputError: this pipeline makes none itself.
        """
        raise InputError(
            f"{type(self).__name__} makes no pictures itself; use a pipeline such as StableDiffusionPipeline"
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__()} - INTERNAL)

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
            torch_dtype, dtype: the precision of all networks, a ``torch.dtype`` or its name. Left out it is half
                precision on mps and cuda, bfloat16 on a CPU with AMX and float32 on others; the plan in the result of a
                call says which was used, and why.
            variant: reads ``model.VARIANT.safetensors`` where there is such a file, "fp16" for example.
            revision, cache_dir, token, force_download, local_files_only: as in huggingface_hub.
            use_safetensors: True takes safetensors files alone, False pickled ones alone, None what is there.
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
        validation.refuse_unknown(elsewhere, ELSEWHERE, "from_pretrained()")
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
        kind = pipeline_class(loaded.class_name) if cls is DiffusionPipeline else cls
        check_components(f"{loaded.source} ({kind.__name__})", kind.parts, loaded.components)
        if requires_safety_checker is None:
            requires_safety_checker = bool(loaded.index.get("requires_safety_checker", True))
        pipe = kind(requires_safety_checker=requires_safety_checker, **loaded.components)
        pipe.index = loaded.index
        pipe._dtype = dtype
        pipe._as_given = frozenset(given)
        for network, pending in loaded.pending.items():
            residency.of(network).source = pending.for_reloading()
        plan = None
        with contextlib.suppress(DoesNotFit):  # too large to draw on the CPU is no reason not to load
            plan = pipe.plan()
        for name, network in pipe._networks().items():
            wanted = dtype_named(plan.dtype(name)) if plan else dtype or torch.float32
            if network in loaded.pending and residency.of(network).dtype != wanted:
                network.to(wanted)  # so that it says in which precision its weights will be
        pipe._pending = True
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
        """Writes a folder in Diffusers form, which Diffusers and Russet read. Functions in it cannot be saved.

        Raises:
            CheckpointError: the folder cannot be written; what stood there before is intact.
        """
        from russet.checkpoints import save

        index = {**self.index, "requires_safety_checker": self.requires_safety_checker}
        components = self._components()
        for name, part in self.parts.items():
            if part.callable and components[name] is not None and not isinstance(components[name], nn.Module):
                log.warning("%s is a function, which cannot be saved: the folder is written without it", name)
                components[name] = None
        with self.weights_in_memory():
            save.pipeline(
                save_directory,
                type(self).__name__,
                components,
                index,
                variant=variant,
                safe_serialization=safe_serialization,
                max_shard_size=max_shard_size,
            )

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

    def _networks(self) -> dict[str, nn.Module]:
        """The same as ``networks``, their weights loaded or not."""
        return {name: part for name in self.parts if isinstance(part := self.known(name), nn.Module)}

    def __repr__(self) -> str:
        known = ((name, self.known(name)) for name in self.parts)
        parts = (f"  {name}: {type(part).__name__}" for name, part in known if part is not None)
        return "\n".join([f"{type(self).__name__} on {self.device}, {dtype_name(self.dtype)}", *parts])


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
        if part.callable and callable(component) and not isinstance(component, (nn.Module, type)):
            continue
        if not isinstance(component, part.kinds) and not wrapped:
            came = "nothing" if component is None else f"{type(component).__module__}.{type(component).__name__}"
            raise ArgumentTypeError(f"{where}: {name} must be a russet {part.kind.__name__}, not {came}")
