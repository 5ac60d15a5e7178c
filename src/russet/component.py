"""What every configured part of a pipeline can do: be made from a config, read from a folder, written to one.

Networks and schedulers know no file. Yet ``AutoencoderKL.from_pretrained(…)`` is public API, so this module finds what
reads and writes them by name, in ``russet.checkpoints``, when it is called.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Self

from russet.config import Config


class Component:
    """A part of a pipeline with a config. A subclass names its ``config_class`` and takes a config first."""

    config_class: ClassVar[type[Config]]
    config: Config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> Self:
        """Makes the component from a config, another component's config or a dict; ``changes`` win.

        Keys that this class does not know are kept in ``config.extra``.

        Raises:
            ConfigError: a value has the wrong type or does not make sense.
        """
        return cls(cls.config_class.merged(config, changes, cls.__name__))  # type: ignore[call-arg]

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Any) -> Self:
        """Reads the component from a folder or a Hub repository; see ``russet.checkpoints.load.component``."""
        component: Self = _checkpoints("load").component(cls, source, **options)
        return component

    @classmethod
    def from_single_file(cls, source: str | os.PathLike[str], **options: Any) -> Self:
        """Reads a network out of a single file; see ``russet.checkpoints.single_file.component.component``."""
        component: Self = _checkpoints("single_file.component").component(cls, source, **options)
        return component

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Writes the component into a folder in Diffusers form; see ``russet.checkpoints.save.component``."""
        _checkpoints("save").component(self, folder, **options)


def _checkpoints(name: str) -> Any:
    return importlib.import_module(f"russet.checkpoints.{name}")
