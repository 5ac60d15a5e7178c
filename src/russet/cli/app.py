"""The command ``russet``: which commands there are, and their exit codes.

Exit codes: 0 done, 1 an error, 2 a wrong argument, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

import russet
from russet.cli import batch, bench, doctor, generate, info, inspect, models, samplers
from russet.errors import InputError, RussetError


class Commands(click.Group):
    """The commands; a first argument that is neither a command nor an option of the group is a prompt."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        own = {name for parameter in self.get_params(context) for name in parameter.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["generate", *args]
        return super().parse_args(context, args)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='A prompt that is also the name of a command: russet generate "info"',
)
@click.version_option(russet.__version__, prog_name="russet", message="%(prog)s %(version)s")
def app() -> None:
    """Generates images from text with Stable Diffusion.

    \b
        russet "a photo of an astronaut riding a horse on mars"

    is short for `russet generate "…"`; its options are in `russet generate --help`.
    """


for command in (
    generate.command,
    batch.command,
    samplers.command,
    inspect.command,
    models.pull,
    models.models,
    models.remove,
    info.command,
    doctor.command,
    bench.command,
):
    app.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(words: list[str]) -> int:
    """Runs the command line; returns the exit code. With ``--debug`` errors are raised, with their traceback."""
    debug = "--debug" in words
    try:
        code: Any = app([word for word in words if word != "--debug"], prog_name="russet", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted")
        return 130
    except BrokenPipeError:  # the reader of stdout has gone; flushing what is left must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except click.UsageError as error:
        error.show()
        return 2
    except click.ClickException as error:
        complain(error.format_message())
        return error.exit_code
    except Exception as error:
        if debug:
            raise
        unexpected = f"unexpected {type(error).__name__}: {error}\nrun it again with --debug to see where"
        complain(str(error) if isinstance(error, RussetError) else unexpected)
        return 2 if isinstance(error, InputError) else 1


def complain(message: str) -> None:
    click.echo(f"russet: {message}", err=True)
