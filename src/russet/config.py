"""A component's config: a frozen dataclass that can also be read like the dict it is saved as.

Each component declares a subclass of ``Config`` whose fields carry the names and the defaults of the checkpoint's JSON.
Keys that no field knows are kept in ``extra``, so that re-saving loses nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from typing_extensions import Self

from russet.errors import ConfigError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Mapping[str, Any]):
    """Base of all configs: ``config.sample_size``, ``config["sample_size"]`` and ``{**config}`` give the same values.

    Fields are checked against their annotations when the config is made; a subclass adds rules that a type cannot
    express in ``check``. JSON lists become tuples.

    Raises:
        ConfigError: a value has the wrong type, or breaks a rule of ``check``.
    """

    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        for name, kind in field_types(type(self)).items():
            value = frozen(getattr(self, name))
            object.__setattr__(self, name, value)
            if not conforms(value, kind):
                raise ConfigError(f"{type(self).__name__}: {name} must be {spelled(kind)}, not {value!r}")
        self.check()

    def check(self) -> None:
        """Raises ConfigError where values of the right type do not make sense together."""

    def require(self, condition: bool, message: str) -> None:
        """Raises ConfigError with ``message`` unless ``condition`` holds."""
        if not condition:
            raise ConfigError(f"{type(self).__name__}: {message}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "") -> Self:
        """Reads a config from JSON data; ``where`` names the file in errors.

        Unknown keys are kept in ``extra`` and reported once, at log level INFO.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where or cls.__name__}: a config must be a JSON object, not {type(data).__name__}")
        known = field_types(cls)
        fields = {key: value for key, value in data.items() if key in known}
        extra = {key: value for key, value in data.items() if key not in known}
        if unused := [key for key, value in extra.items() if not key.startswith("_") and value is not None]:
            log.info("%s: keys kept but not used: %s", where or cls.__name__, ", ".join(sorted(unused)))
        try:
            return cls(**fields, extra=extra)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None if where else error

    @classmethod
    def merged(cls, config: Mapping[str, Any], changes: Mapping[str, Any], where: str = "") -> Self:
        """Another config, or JSON data, with changes made to it; see ``from_dict``."""
        return cls.from_dict({**config, **changes}, where)

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, changes: Mapping[str, Any]) -> Self:
        """The config that a constructor was given: as one object, as keyword arguments, or both.

        Raises:
            ConfigError: a keyword that the config does not have.
        """
        known = field_types(cls)
        if unknown := [name for name in changes if name not in known]:
            raise ConfigError(f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(known)}")
        if config is None:
            return cls(**changes)
        base = config if isinstance(config, cls) else cls.from_dict(config)
        return dataclasses.replace(base, **changes) if changes else base

    def to_dict(self) -> dict[str, Any]:
        """All keys in saving order, tuples as lists: what goes into the JSON file."""
        return {name: thawed(value) for name, value in self.items()}

    # A config reads like a dict, since programs written for Diffusers treat it as one.
    def __getitem__(self, name: str) -> Any:
        return getattr(self, name) if name in field_types(type(self)) else self.extra[name]

    def __iter__(self) -> Iterator[str]:
        yield from field_types(type(self))
        yield from self.extra

    def __len__(self) -> int:
        return len(field_types(type(self))) + len(self.extra)

    def __getattr__(self, name: str) -> Any:  # reached only for names that are no field
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}")


@functools.cache
def field_types(cls: type[Config]) -> dict[str, Any]:
    """The config's own fields and their resolved annotations, ``extra`` left out."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name != "extra"}


def conforms(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the annotated type; an int passes as a float, a bool never as a number."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(conforms(value, option) for option in options)
    if origin is typing.Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if origin is tuple:
        items = options[:1] * len(value) if isinstance(value, tuple) and options[-1] is ... else options
        return isinstance(value, tuple) and len(value) == len(items) and all(map(conforms, value, items))
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, origin or kind)


def spelled(kind: Any) -> str:
    """An annotation as a person would write it."""
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def frozen(value: Any) -> Any:
    return tuple(frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def thawed(value: Any) -> Any:
    return [thawed(item) for item in value] if isinstance(value, (list, tuple)) else value
