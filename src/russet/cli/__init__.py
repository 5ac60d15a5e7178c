"""The command line: ``russet "a prompt"`` and the commands around it. torch is imported when a command needs it."""

from russet.cli.app import main

__all__ = ["main"]
