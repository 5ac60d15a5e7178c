"""Networks without weights that load them for whoever uses them.

A user may hold a network, or a module of it, whose weights have been dropped. Its class is then one that is made here
from its own: any attribute but the config loads the weights first, and gives the module its own class back.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import nn

from russet.residency.weights import submodules

NEEDS_NO_WEIGHTS = frozenset({"__class__", "__dict__", "__doc__", "__module__", "config", "config_class"})


class Loader(Protocol):
    """What loads the weights of a network."""

    def load_for_user(self) -> bool:
        """Loads the weights if they are not in memory; False while this thread is about to do so already."""
        ...


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_LOADERS: weakref.WeakKeyDictionary[nn.Module, Loader] = weakref.WeakKeyDictionary()


def unloaded_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a module's class whose objects load themselves when they are used."""
    if cls not in _CLASSES:
        _CLASSES[cls] = _made_unloaded(cls)
    return _CLASSES[cls]


def _made_unloaded(cls: Any) -> Any:

    def __getattribute__(self: nn.Module, name: str) -> Any:
        if name in NEEDS_NO_WEIGHTS or not _LOADERS[self].load_for_user():
            return cls.__getattribute__(self, name)
        return getattr(self, name)

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        if _LOADERS[self].load_for_user():
            setattr(self, name, value)
        else:
            cls.__setattr__(self, name, value)

    def __delattr__(self: nn.Module, name: str) -> None:
        _LOADERS[self].load_for_user()
        delattr(self, name)

    methods = {"__getattribute__": __getattribute__, "__setattr__": __setattr__, "__delattr__": __delattr__}
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**methods, **names, "_loaded_class": cls})


def mark_unloaded(network: nn.Module, loader: Loader) -> None:
    """Has the network and every module beneath it load the weights when they are used."""
    for module in [*submodules(network)]:
        if "_loaded_class" not in type(module).__dict__:
            _LOADERS[module] = loader
            object.__setattr__(module, "__class__", unloaded_class(type(module)))


def mark_loaded(network: nn.Module) -> None:
    """Gives the modules their own classes back."""
    for module in [*submodules(network)]:
        if "_loaded_class" in type(module).__dict__:
            object.__setattr__(module, "__class__", type(module).__dict__["_loaded_class"])
            _LOADERS.pop(module, None)
