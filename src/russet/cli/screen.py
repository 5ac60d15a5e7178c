"""What a person sees while a command works: lines and a bar on stderr, so that stdout holds results alone."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

import click


class Screen:
    """Lines and progress on stderr; nothing at all when quiet. A bar is shown only where stderr is a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    def line(self, text: str) -> None:
        """Shows a line; an open bar stays below it."""
        if self.quiet:
            return
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
        else:
            click.echo(text, err=True)

    def bar(self, what: str) -> dict[str, Any]:
        """The options of a pipeline's progress bar, which vanishes when it is full."""
        return {"desc": what, "leave": False, "disable": self.quiet or not sys.stderr.isatty()}

    @contextlib.contextmanager
    def warnings(self) -> Iterator[None]:
        """Shows what the library logs as a warning, as lines."""
        handler = Lines(self)
        logger = logging.getLogger("russet")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)


class Lines(logging.Handler):
    """Log records as lines of a screen."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.WARNING)
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self.screen.line(f"{record.levelname.lower()}: {record.getMessage()}")
