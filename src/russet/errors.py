"""Every error that Russet raises on purpose.

    RussetError
    ├── InputError (ValueError)                an argument has a wrong value
    │   ├── ArgumentTypeError (TypeError)      … a wrong type
    │   └── UnsupportedArgument (TypeError)    … a name that Russet does not know
    ├── ConfigError (ValueError)               a config says something that cannot be built
    ├── CheckpointError (OSError)              a checkpoint cannot be read or written
    │   ├── MissingFile (FileNotFoundError)    … a file or folder is not there
    │   ├── CorruptFile                        … a file is not what its name says
    │   ├── UnsafeFile                         … a file asks for something that it must not have
    │   ├── KeyMismatch                        … the weights do not fit the model
    │   └── HubError                           … the Hugging Face Hub did not give it
    ├── DeviceError (RuntimeError)             the device cannot do what was asked
    │   └── DoesNotFit                         … because there is too little memory
    └── OutputError (OSError)                  a picture cannot be written

Each message says what was wrong, what came and what to do. The built-in parents keep programs working that catch
``ValueError`` or ``OSError``, as programs written for Diffusers do.
"""

from __future__ import annotations


class RussetError(Exception):
    """The root of the tree: catch this to catch everything that Russet raises on purpose."""


class InputError(RussetError, ValueError):
    """An argument has a value that cannot be used."""


class ArgumentTypeError(InputError, TypeError):
    """An argument has a type that cannot be used."""


class UnsupportedArgument(InputError, TypeError):
    """A keyword argument is unknown, or is one of Diffusers' that Russet does not have."""


class ConfigError(RussetError, ValueError):
    """A config (a component's JSON file, or the values given for it) cannot be built."""


class CheckpointError(RussetError, OSError):
    """A checkpoint cannot be read or written."""


class MissingFile(CheckpointError, FileNotFoundError):
    """A file, folder or repository is not where it was looked for."""


class CorruptFile(CheckpointError):
    """A file is damaged, cut short, or not of the kind that its name says."""


class UnsafeFile(CheckpointError):
    """A file asks for something that loading must never do: run code, or leave its folder."""


class KeyMismatch(CheckpointError):
    """The weights do not fit the model: keys are missing, unexpected or wrongly shaped."""


class HubError(CheckpointError):
    """The Hugging Face Hub did not give the checkpoint: no network, no access, no such repository."""


class DeviceError(RussetError, RuntimeError):
    """The device is absent, or cannot do what was asked of it."""


class DoesNotFit(DeviceError):
    """The work needs more memory than the device has."""


class OutputError(RussetError, OSError):
    """A picture cannot be written where it was asked to go."""
