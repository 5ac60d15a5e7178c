"""Pipelines from one file, and into one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import Self

from russet.checkpoints import load
from russet.errors import CheckpointError
from russet.pipelines.registry import PIPELINES, pipeline_class

if TYPE_CHECKING:
    import torch


class SingleFiles:
    """The part of a pipeline that reads and writes files which hold a whole model, as other programs do."""

    if TYPE_CHECKING:  # what the pipeline brings
        parts: ClassVar[Mapping[str, Any]]
        assemble: ClassVar[Callable[..., Any]]

        def _components(self) -> dict[str, Any]: ...

        def weights_in_memory(self) -> contextlib.AbstractContextManager[None]: ...

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        original_config: str | os.PathLike[str] | None = None,
        prediction_type: str | None = None,
        extract_ema: bool = False,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        force_download: bool = False,
        **components: Any,
    ) -> Self:
        """Opens a pipeline in one .safetensors or .ckpt file. The configs are Russet's own: no network is needed.

        The weights are read when they are needed, as with ``from_pretrained``.

        Args:
            pretrained_model_link_or_path: a file, its address on the Hub, or "owner/name/file.safetensors".
            torch_dtype, dtype: as for ``from_pretrained``.
            config: the model's configs, where the published ones are not right: the name of a bundled model
                ("sd2-v"), "mini", a folder in Diffusers form, a Hub id, or a dict from component to config.
            original_config: a YAML config of the model's authors; one beside the file under its name is found.
            prediction_type: "epsilon" or "v_prediction", where neither the file nor the YAML says.
            extract_ema: takes the averaged UNet, where the file has both.
            revision, cache_dir, token, force_download, local_files_only: as in huggingface_hub.
            **components: used in place of the file's own (``vae=…``, ``scheduler=…``), or added
                (``safety_checker=…``, ``feature_extractor=…``); None leaves one out.

        Raises:
            CheckpointError: the file is missing, damaged, unsafe, of a kind that cannot be loaded, or does not fit.
            ConfigError: a config cannot be built.
            InputError: an argument has a wrong type or value, or names no component.
        """
        from russet.checkpoints.single_file.load import single_file

        precision = load.read_dtype(torch_dtype=torch_dtype, dtype=dtype)
        options = load.Options(
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            force_download=force_download,
        )
        loaded = single_file(
            pretrained_model_link_or_path,
            overrides=components,
            dtype=precision,
            options=options,
            accepts=cls._accepted,
            postponed=True,
            config=config,
            original_config=original_config,
            prediction_type=prediction_type,
            extract_ema=extract_ema,
        )
        pipe: Self = cls.assemble(loaded, precision, given=components)
        return pipe

    @classmethod
    def _accepted(cls, name: str) -> Collection[str]:
        """The components of this pipeline, or where this is the base of all, of the one that a file is for."""
        if not cls.parts and name not in PIPELINES:
            raise CheckpointError(
                f"the file is for a {name}, which Russet does not have; its networks can be loaded by themselves, "
                "with the from_single_file of their classes"
            )
        accepted: Collection[str] = cls.parts or pipeline_class(name).parts
        return accepted

    def save_single_file(self, path: str | os.PathLike[str]) -> None:
        """Writes UNet, VAE and text encoders into one .safetensors file that other programs read.

        Raises:
            InputError: the path does not end in .safetensors, or a network is missing.
            CheckpointError: the file cannot be written; one that stood there before is intact.
        """
        from russet.checkpoints.single_file.save import save_single_file

        with self.weights_in_memory():
            save_single_file(self._components(), path)
