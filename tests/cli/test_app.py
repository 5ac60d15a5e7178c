"""The command line as a whole: help, wrong arguments, exit codes, and how long it takes to start."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import click
import pytest

import russet
from russet.cli import app as cli
from russet.cli.app import run
from russet.errors import CorruptFile, InputError


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["generate", "--help"], ["info", "-h"]])
def test_help_is_shown_on_stdout(words, capsys):
    assert run(words) == 0
    assert capsys.readouterr().out.startswith("Usage: russet")


def test_no_words_show_the_help():
    done = russet_command()
    assert done.returncode == 2
    assert "Usage: russet" in done.stdout + done.stderr


def test_every_command_is_listed_with_a_help_line(capsys):
    run(["--help"])
    shown = capsys.readouterr().out
    for name, command in cli.app.commands.items():
        assert f"  {name} " in shown
        assert command.get_short_help_str(200)
        assert all(not isinstance(option, click.Option) or option.help for option in command.params), name


def test_version_is_the_packages(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"russet {russet.__version__}\n"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["generate"], "PROMPT"),
        (["a cat", "--steps", "0"], "--steps"),
        (["a cat", "--steps", "many"], "many"),
        (["a cat", "--colour", "red"], "--colour"),
        (["a cat", "a dog"], "a dog"),
        (["a cat", "--dtype", "int8"], "int8"),
        (["a cat", "-o", "cat.jpg"], "cat.png"),
        (["a cat", "--seed", "-1"], "--seed"),
    ],
)
def test_a_wrong_argument_is_one_message_and_code_2(words, hint, capsys):
    assert run(words) == 2
    shown = capsys.readouterr()
    assert hint in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (CorruptFile("vae.json is damaged"), 1, "russet: vae.json is damaged\n"),
        (InputError("width must be divisible by 8"), 2, "russet: width must be divisible by 8\n"),
        (KeyboardInterrupt(), 130, "russet: interrupted\n"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_ends_in_one_message_and_its_code(error, code, shown, capsys, failing):
    failing(error)
    assert run(["fail"]) == code
    err = capsys.readouterr().err
    assert shown in err
    assert "Traceback" not in err


def test_debug_lets_the_error_through(failing):
    failing(CorruptFile("vae.json is damaged"))
    with pytest.raises(CorruptFile):
        run(["fail", "--debug"])


@pytest.fixture
def failing(monkeypatch):
    """Adds a command ``fail`` that raises what it is given."""

    def add(error: BaseException) -> None:
        @click.command("fail")
        def fail() -> None:
            raise error

        monkeypatch.setitem(cli.app.commands, "fail", fail)

    return add


def test_info_names_the_versions_and_the_device(capsys):
    assert run(["info"]) == 0
    shown = capsys.readouterr().out
    import torch

    for text in (russet.__version__, torch.__version__.partition("+")[0], "chip", "memory"):
        assert text in shown


def test_info_as_json_is_json(capsys):
    assert run(["info", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["russet"] == russet.__version__
    assert report["device"] == "cpu"


def test_a_device_that_is_no_device_is_refused(capsys):
    assert run(["info", "--device", "tpu"]) == 2
    assert "tpu" in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_error_to_talk_about():
    code = "from russet.cli import main; main()"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code, "samplers"], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_help_takes_less_than_a_third_of_a_second():
    """Of processor time: what other programs do meanwhile does not count."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        russet_command("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3, times


def russet_command(*words: str) -> subprocess.CompletedProcess[str]:
    code = "from russet.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "russet", "--version"], capture_output=True, text=True, check=True)
    assert russet.__version__ in done.stdout
